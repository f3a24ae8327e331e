"""A small token data set of shapes for benchmarks."""

import subprocess
import sys
from pathlib import Path


def make_tokens(folder: Path, count: int = 6000, dvae_steps: int = 600) -> str:
    """Pack shapes, train a dVAE and a tokenizer, and tokenize; finished parts are kept."""
    raw, tokens, dvae, bpe = (str(folder / name) for name in ("raw", "tokens", "dvae", "bpe"))
    run_tapir("pack", "shapes", raw, f"--count={count}", "--validation=0.1")
    run_tapir("train", "bpe", "tiny", f"--data={raw}", f"--out={bpe}")
    run_tapir(
        "train", "dvae", "tiny", f"--data={raw}", f"--out={dvae}", f"--loop.steps={dvae_steps}"
    )
    run_tapir("tokenize", raw, tokens, f"--dvae={dvae}", f"--bpe={bpe}", "--block=16")
    return tokens


def run_tapir(*arguments: str) -> None:
    """Run one command of Tapir; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "tapir", *arguments], check=True, capture_output=True)
