"""`tapir sample --follow` beside a prior in training: pictures of its checkpoints over time."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.errors import InputError
from core.storage.store import FolderStore
from generation.follow import BOARD, steps_to_draw
from tests.harness import PATIENCE, start_tapir, tapir

CAPTIONS = ["a small red circle", "two blue squares"]
STEPS = 12


@pytest.mark.slow
def test_samples_of_each_checkpoint_stand_in_tensorboard(
    tokens: Path, bpe: Path, dvae: Path, tmp_path: Path
) -> None:
    prior = tmp_path / "prior"
    train = ["train", "prior", "tiny", f"--data={tokens}", f"--out={prior}", "--mesh.data=2"]
    train += [f"--loop.steps={STEPS}", "--loop.global-batch-size=16", "--checkpoint.every=4"]
    training = start_tapir(*train, "--checkpoint.keep=9", log=tmp_path / "log")
    while not (prior / "config.json").exists():
        assert training.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    models = [f"--prior={prior}", f"--dvae={dvae}", f"--bpe={bpe}", "--no-rerank"]
    few = ["--candidates=3", "--show=2"]
    best = tmp_path / "best.png"
    output = tapir("sample", *CAPTIONS, *models, *few, f"--out={best}", "--follow")
    assert training.wait(PATIENCE) == 0
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert rows == [{"step": step} for step in (4, 8, STEPS)]
    assert _shown(prior) == {f"samples/{caption}": [4, 8, STEPS] for caption in CAPTIONS}
    last = best.read_bytes()
    tapir("sample", *CAPTIONS, *models, *few, f"--out={best}")
    assert best.read_bytes() == last
    again = ["sample", *reversed(CAPTIONS), *models, *few, f"--out={best}", "--follow"]
    assert '"step"' not in tapir(*again)
    tapir("sample", *CAPTIONS, *models, "--follow", "--step=4", code=2)
    _damage(prior / "checkpoints" / "step-8")
    output = tapir("sample", "a cat", *models, *few, f"--out={best}", "--follow")
    assert "damaged" in output and "step 12: samples" in output
    before = {f"samples/{caption}": [4, 8, STEPS] for caption in CAPTIONS}
    assert _shown(prior) == {**before, "samples/a cat": [4, STEPS]}
    for step in (4, STEPS):
        _damage(prior / "checkpoints" / f"step-{step}")
    assert "damaged" in tapir("sample", "a dog", *models, "--follow", code=1)


def _shown(prior: Path) -> dict[str, list[int]]:
    """Steps of the pictures under each tag, as TensorBoard reads them."""
    events = EventAccumulator(str(prior / BOARD)).Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def _damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("rank-*"))
    data = file.read_bytes()
    file.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])


def test_a_follower_that_is_too_slow_goes_on_with_the_newest(tmp_path: Path) -> None:
    """Otherwise each checkpoint would be deleted before it is read."""
    config = {"stage": "prior", "loop": {"steps": 9}, "checkpoint": {"to": str(tmp_path / "c")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    store = FolderStore(tmp_path / "c")
    for step in (1, 2, 3):
        store.put(f"step-{step}/manifest.json", b"")
    steps = steps_to_draw(tmp_path)
    assert next(steps) == 1
    assert next(steps) == 2
    for step in (4, 5, 6, 7):
        store.put(f"step-{step}/manifest.json", b"")
        store.delete(f"step-{step - 3}/manifest.json")
    assert next(steps) == 7
    (tmp_path / "model.json").write_text("{}")
    assert list(steps) == []


def test_a_folder_without_checkpoints_is_not_followed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prior in"):
        next(steps_to_draw(tmp_path))
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(InputError, match="no checkpoints to follow"):
        next(steps_to_draw(tmp_path))
