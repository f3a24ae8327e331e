"""Run by pytest to fill the folder that `made` names; collected by nothing else."""

from pathlib import Path


def test_fill(raw: Path, bpe: Path, dvae: Path, tokens: Path) -> None:
    assert all(any(folder.iterdir()) for folder in (raw, bpe, dvae, tokens))
