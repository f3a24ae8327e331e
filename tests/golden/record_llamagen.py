"""Records tests/golden/llamagen.json from a clone of LlamaGen's repository.

    python -m tests.golden.record_llamagen CLONE COMMIT

Keyed weights in its own VQModel with 32 instead of 128 channels: codes, and every fourth pixel.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.tokenizer_weights import keyed_pictures, keyed_weights

FILE = Path(__file__).with_name("llamagen.json")
LEVELS = {"VQ-8": (1, 2, 2, 4), "VQ-16": (1, 1, 2, 2, 4)}
PIXELS, STRIDE, CHANNELS = 32, 4, 32


def main(clone: Path, commit: str) -> None:
    """Write the file."""
    path = clone / "tokenizer" / "tokenizer_image" / "vq_model.py"
    spec = importlib.util.spec_from_file_location("llamagen_vq_model", path)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)
    rows = {name: _recorded(theirs, levels) for name, levels in LEVELS.items()}
    body = {"repository": "FoundationVision/LlamaGen", "commit": commit, "models": rows}
    FILE.write_text(json.dumps(body, indent=None, separators=(",", ":")) + "\n")


@torch.no_grad()
def _recorded(theirs: Any, levels: tuple[int, ...]) -> dict[str, Any]:
    sizes = {"encoder_ch_mult": list(levels), "decoder_ch_mult": list(levels)}
    model = theirs.VQModel(theirs.ModelArgs(**sizes))
    width = model.config.z_channels
    model.encoder = theirs.Encoder(ch=CHANNELS, ch_mult=levels, z_channels=width)
    model.decoder = theirs.Decoder(ch=CHANNELS, ch_mult=levels, z_channels=width)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    shapes = {name: shape for name, shape in shapes.items() if "codebook_used" not in name}
    model.load_state_dict(keyed_weights(shapes), strict=False)
    model.eval()
    quant, _, (_, _, codes) = model.encode(keyed_pictures(2, PIXELS) * 2 - 1)
    drawn = model.decode_code(codes, quant.shape).add(1).div(2).clamp(0, 1)
    return {
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "codes": codes.view(2, -1).tolist(),
        "pixels": [round(v, 7) for v in drawn[:, :, ::STRIDE, ::STRIDE].flatten().tolist()],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
