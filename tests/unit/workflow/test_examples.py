"""Every run file in examples/ is checked whole, and its commands are printed."""

from pathlib import Path

import pytest

from tests.harness import ROOT, tapir

EXAMPLES = sorted(path for kind in ("*.yaml", "*.py") for path in (ROOT / "examples").glob(kind))
STAGES = {
    "coco": ["pack", "bpe", "dvae", "tokenize", "overlap", "prior", "clip", "score"],
    "finetune": ["pack", "tokenize", "prior"],
    "folder": ["pack", "bpe", "dvae", "tokenize", "prior", "clip", "evaluate", "report"],
    "laion": ["pack", "bpe", "dvae", "tokenize"],
    "panels": ["pack", "bpe", "dvae", "tokenize", "prior", "clip", "evaluate", "report"],
    "paper": ["pack", "bpe", "dvae", "tokenize", "prior"],
    "shapes": ["pack", "bpe", "dvae", "tokenize", "prior", "clip", "evaluate", "report"],
}
"""Commands that each run file starts."""
KEY = "a-key-that-no-script-may-hold"
FLAGS = {"finetune": "--track=tensorboard,wandb", "folder": "--near=3", "paper": "paper_12b"}


@pytest.mark.seconds
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.stem))
def test_a_run_file_is_sound(path: Path) -> None:
    text = tapir("submit", str(path), "--to=slurm", "--dry-run", WANDB_API_KEY=KEY)
    for stage in STAGES[path.stem]:
        train = "train " if stage in ("bpe", "dvae", "prior", "clip") else ""
        assert f"tapir {train}{stage} " in text, stage
    assert FLAGS.get(path.stem, "") in text and KEY not in text


def test_each_example_is_known() -> None:
    assert {path.stem for path in EXAMPLES} == STAGES.keys()
