"""Small token data sets for benchmarks."""

import os
import subprocess
from pathlib import Path

from bench.support.children import child_environment, module_command
from bench.support.sizes import sized

DATA = sized((6000, 600), (400, 2))
"""Pairs, and steps of their dVAE."""
GIVEN = "TAPIR_BENCH_TOKENS"
"""Environment variable with the place of tokens that are there already."""


def make_tokens(folder: Path, count: int, dvae_steps: int, source: str = "shapes") -> str:
    """Pack shapes or emoji, train a dVAE and a tokenizer, and tokenize; finished parts are kept.

    TAPIR_BENCH_TOKENS names tokens that are there already.
    """
    if given := os.environ.get(GIVEN):
        return given
    raw, tokens, dvae, bpe = (str(folder / name) for name in ("raw", "tokens", "dvae", "bpe"))
    small = sized([], ["--block=8"])
    run_tapir("pack", source, raw, f"--count={count}", "--validation=0.1", *small)
    run_tapir("train", "bpe", "tiny", f"--data={raw}", f"--out={bpe}")
    run_tapir(
        "train", "dvae", "tiny", f"--data={raw}", f"--out={dvae}", f"--loop.steps={dvae_steps}"
    )
    run_tapir("tokenize", raw, tokens, f"--dvae={dvae}", f"--bpe={bpe}", f"--block={sized(16, 8)}")
    return tokens


def run_tapir(*arguments: str) -> None:
    """Run one command of Tapir; raises SystemExit with its output if it fails."""
    command = module_command("tapir", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise SystemExit(f"tapir {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
