"""Damaged, missing and hostile checkpoint files."""

import pickle
import random
from pathlib import Path

import pytest
import torch

from checkpoint.format import StateSlice
from checkpoint.reader import CheckpointReader
from checkpoint.writer import save_checkpoint
from core.errors import CheckpointError, CorruptError
from training.run_folder import RunFolder


def _slices(value: float) -> list[StateSlice]:
    found = []
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        data = torch.full((12,), value) + torch.arange(12)
        for start in (0, 5):
            part = data[start : 5 if start == 0 else 12]
            found.append(
                StateSlice(
                    name="w", kind=kind, shape=(3, 4), box=((0, 3), (0, 4)), start=start, data=part
                )
            )
    return found


def _save(folder: Path, value: float = 0.0) -> None:
    save_checkpoint(folder, _slices(value), {"step": int(value)}, 0, lambda text: [text])


def test_slices_come_back_as_the_global_tensor(tmp_path: Path) -> None:
    _save(tmp_path / "step-1")
    reader = CheckpointReader(tmp_path / "step-1")
    assert reader.tensor("w", "master").equal(torch.arange(12.0).view(3, 4))
    assert reader.shapes() == {"w": (3, 4)}
    with pytest.raises(CheckpointError, match="no step of 'w'"):
        reader.tensor("w", "step")


def test_every_flipped_bit_is_refused_and_named(tmp_path: Path) -> None:
    _save(tmp_path / "step-1")
    draws = random.Random(0)
    for path in sorted((tmp_path / "step-1").iterdir()):
        whole = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CorruptError, match=path.name):
                CheckpointReader(tmp_path / "step-1")
        path.write_bytes(whole)
    CheckpointReader(tmp_path / "step-1")


def test_truncated_and_missing_files_and_planted_pickles(tmp_path: Path) -> None:
    folder, marker = tmp_path / "step-1", tmp_path / "marker"

    class Plant:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(marker), "w"))  # type: ignore[return-value]

    _save(folder)
    path = folder / "rank-00000.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-1], b"", pickle.dumps(Plant())):
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=path.name):
            CheckpointReader(folder)
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        CheckpointReader(folder)
    (folder / "manifest.json").write_bytes(pickle.dumps(Plant()))
    with pytest.raises(CorruptError, match="manifest"):
        CheckpointReader(folder)
    assert not marker.exists()


def test_an_older_checkpoint_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {}, writes=True)
    for step in (10, 20, 30):
        _save(run.step_folder(step), float(step))
    (run.step_folder(30) / "manifest.json").unlink()
    damaged = run.step_folder(20) / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    found = run.newest()
    assert found is not None and found.facts["step"] == 10
    (run.step_folder(10) / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        run.newest()
    run.close()
