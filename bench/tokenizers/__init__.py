"""Image tokenizers side by side: PSNR, SSIM, rFID, codes, pictures/s, minutes of training."""

from bench.tokenizers.parent import run

__all__ = ["run"]
