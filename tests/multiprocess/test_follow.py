"""`tapir sample --follow` beside a prior in training: pictures of its checkpoints over time."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.errors import InputError
from generation.follow import BOARD, steps_to_draw
from tests.harness import start_tapir, tapir

CAPTIONS = ["a small red circle", "two blue squares"]
STEPS = 12


@pytest.mark.slow
def test_samples_of_each_checkpoint_stand_in_tensorboard(
    tokens: Path, bpe: Path, dvae: Path, tmp_path: Path
) -> None:
    prior = tmp_path / "prior"
    train = ["train", "prior", "tiny", f"--data={tokens}", f"--out={prior}", "--mesh.data=2"]
    train += [f"--loop.steps={STEPS}", "--loop.batch=16", "--checkpoint.every=4"]
    training = start_tapir(*train, "--checkpoint.keep=9", log=tmp_path / "log")
    while not (prior / "config.json").exists():
        assert training.poll() is None, (tmp_path / "log").read_text()
    models = [f"--prior={prior}", f"--dvae={dvae}", f"--bpe={bpe}", "--no-rank"]
    few = ["--candidates=3", "--show=2"]
    best = tmp_path / "best.png"
    said = tapir("sample", *CAPTIONS, *models, *few, f"--out={best}", "--follow")
    assert training.wait(120) == 0
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert rows == 3 * [{caption: [] for caption in CAPTIONS}]
    events = EventAccumulator(str(prior / BOARD)).Reload()
    tags = events.Tags()["images"]
    assert len(tags) == len(CAPTIONS) and all("circle" in t or "squares" in t for t in tags)
    assert [[event.step for event in events.Images(tag)] for tag in tags] == 2 * [[4, 8, STEPS]]
    last = best.read_bytes()
    tapir("sample", *CAPTIONS, *models, *few, f"--out={best}")
    assert best.read_bytes() == last
    tapir("sample", *CAPTIONS, *models, *few, f"--out={best}", "--follow")
    again = EventAccumulator(str(prior / BOARD)).Reload()
    assert [[event.step for event in again.Images(tag)] for tag in tags] == 2 * [[4, 8, STEPS]]
    tapir("sample", *CAPTIONS, *models, "--follow", "--step=4", code=2)
    _damage(prior / "checkpoints" / "step-8")
    said = tapir("sample", *CAPTIONS, *models, *few, f"--out={best}", "--follow")
    assert "damaged" in said and "step 12: samples" in said
    for step in (4, STEPS):
        _damage(prior / "checkpoints" / f"step-{step}")
    assert "damaged" in tapir("sample", *CAPTIONS, *models, "--follow", code=1)


def _damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("rank-*"))
    data = file.read_bytes()
    file.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])


def test_what_has_no_checkpoints_is_not_followed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prior in"):
        next(steps_to_draw(tmp_path))
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(InputError, match="no checkpoints to follow"):
        next(steps_to_draw(tmp_path))
