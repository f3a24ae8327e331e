"""Warnings of one line about a run that degrades slowly."""

import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError, InputError, StoreError, TrainingError, of_files
from core.log import LOG
from core.storage.store import FolderStore, free_space
from parallel.config import OptimConfig
from parallel.device import CPU
from parallel.mesh import Mesh
from training.config import DVAETrain, GuardConfig, LoopConfig, PriorTrain
from training.presets import dvae_tiny, prior_tiny
from training.profiling.categories import ProfileConfig
from training.profiling.figures import cores_of, peaks_of, speed_of
from training.run import alarms
from training.run import folder as run_folder
from training.run.alarms import CHECKPOINTS_FREE, WARM, WINDOW, Alarms, weight_bytes
from training.run.folder import RunFolder, read_rows


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level(logging.WARNING, LOG.name)
    return caplog


def _alarms(settings: Any, shapes: Any = ((10,),)) -> Alarms:
    return Alarms(settings, Mesh(), shapes)


def _row(used: float, of: int = 64) -> dict[str, float]:
    return {"loss": 1.0, "codes_used": used, "codebook_usage": used / of}


def test_a_dead_codebook_is_told_once_from_a_quarter_of_the_run_on(told: Any) -> None:
    settings = replace(dvae_tiny(), loop=LoopConfig(steps=1000))
    alarms = _alarms(settings)
    alarms.codes(_row(1), 249)
    alarms.codes(_row(7), 250)
    alarms.codes({"loss": 1.0}, 250)
    assert not told.messages
    alarms.codes(_row(1), 250)
    alarms.codes(_row(2), 500)
    assert len(told.messages) == 1
    assert "step 250: the dVAE uses 1 of its codes (1.6%" in told.messages[0]
    assert "--loop.seed" in told.messages[0] and "--model.codebook" in told.messages[0]
    alarms.codes(_row(60), 600)
    alarms.codes(_row(3), 700)
    assert len(told.messages) == 2


def test_the_codebook_guard_stops_a_run_that_has_steps_left(told: Any) -> None:
    settings = replace(
        dvae_tiny(),
        loop=LoopConfig(steps=1000),
        guard=GuardConfig(min_codebook_usage=0.5, codebook_usage_after=0.1),
    )
    alarms = _alarms(settings)
    alarms.codes(_row(20), 99)
    alarms.codes(_row(32), 100)
    with pytest.raises(
        TrainingError, match=r"step 100: the dVAE uses 31 .*guard\.min_codebook_usage=0\.5"
    ):
        alarms.codes(_row(31), 100)
    alarms.codes(_row(31), 1000)  # a finished run keeps its model; this only warns
    assert len(told.messages) == 1


def test_an_invalid_codebook_guard_is_refused_at_once() -> None:
    asked = GuardConfig(min_codebook_usage=1.5)
    assert "guard.min_codebook_usage and guard.codebook_usage_after are fractions" in "\n".join(
        asked.problems()
    )
    blind = replace(
        dvae_tiny(), guard=GuardConfig(min_codebook_usage=0.2), loop=LoopConfig(validate_every=0)
    )
    assert "guard.min_codebook_usage needs validations" in "\n".join(blind.fixed_problems())
    prior = replace(prior_tiny(), guard=GuardConfig(min_codebook_usage=0.2))
    assert "only a dVAE has codes" in "\n".join(prior.fixed_problems())


def test_a_disk_too_full_for_two_checkpoints_is_warned_about(told: Any, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "not there yet" / "checkpoints")
    free = free_space(store)
    assert free is not None and free > 0
    roomy = _alarms(PriorTrain(), [(10,)])
    roomy.disk(store, 5)
    assert not told.messages
    tight = _alarms(PriorTrain(), [(free // CHECKPOINTS_FREE // 12 + 10**6,)])
    tight.disk(store, 5)
    tight.disk(store, 10)
    assert len(told.messages) == 1 and "free space" in told.messages[0]
    assert str(store.url) in told.messages[0] and "--checkpoint.to" in told.messages[0]


def test_a_checkpoint_s_bytes_are_weights_moments_and_average() -> None:
    assert weight_bytes([(2, 3), (4,)], OptimConfig()) == 10 * 12
    assert weight_bytes([(10,)], OptimConfig(moments="bf16", ema=0.9)) == 10 * 12
    assert weight_bytes([(10,)], OptimConfig(moments="bf16")) == 10 * 8


def test_a_run_much_slower_than_its_plan_is_told_once(told: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"time": {"compute": 0.75, "data": 0.25}}))
    alarms = _alarms(PriorTrain(profile=ProfileConfig(plan=plan)))
    for step in range(WARM):
        alarms.pace(step, 100.0)
    for step in range(WINDOW):
        alarms.pace(step, 1.99)
    assert not told.messages
    for step in range(WINDOW):
        alarms.pace(step, 2.5)
    assert len(told.messages) == 1
    assert "times the 1 s of" in told.messages[0] and "tapir profile" in told.messages[0]


def test_an_invalid_plan_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(InputError, match="is not a plan"):
        _alarms(PriorTrain(profile=ProfileConfig(plan=tmp_path / "plan.json")))


def test_ranks_that_share_cores_do_not_add_up() -> None:
    """The case that was reported: 8 ranks, a thread each, on 2 cores of 1.2 TFLOP/s."""
    shared = {"host": "a", "cores": "3", "threads": 1}
    eight = [{"peak": 0.9 + 0.1 * (i == 3), **shared} for i in range(8)]
    assert peaks_of(eight) == (2.0, 2.0)
    assert speed_of(eight, 0.5) == {
        "peak_tflops": 2.0,
        "concurrent_ranks": 2.0,
        "model_tflops": 0.5,
        "mfu": 0.25,
    }
    pinned = [{"peak": 1.0, "host": "a", "cores": f"{1 << i:x}", "threads": 1} for i in range(4)]
    assert peaks_of(pinned) == (4.0, 4.0)
    assert peaks_of([*pinned, {"peak": 1.0, **shared, "host": "b"}]) == (5.0, 5.0)
    assert peaks_of([{"peak": 3.0}, {"peak": 4.0}]) == (7.0, 2.0)  # a GPU each
    wide = [{"peak": 1.5, "host": "a", "cores": "3", "threads": 2} for _ in range(2)]
    assert peaks_of(wide) == (1.5, 1.0)
    assert int(cores_of(CPU)["cores"], 16).bit_count() >= 1


def test_rows_that_a_full_disk_did_not_take_are_written_later(
    tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills within a row: the partial row is removed as well."""
    folder = RunFolder(tmp_path, {}, writes=True)
    folder.begin(0)
    folder.log({"step": 1, "loss": 1.0})

    real = open
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", lambda *a: _Full(real(*a)), raising=False)
        folder.log({"step": 2, "loss": 2.0})
    assert "No space left" in told.messages[0] and "free space" in told.messages[0]
    folder.log({"step": 3, "loss": 3.0})
    folder.close()
    rows, bad = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3] and bad == 0


class _Full:
    """A file on a disk with five bytes left."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, text: str) -> None:
        self._file.write(text[:5])
        self._file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_error_of_a_full_disk_tells_what_to_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = of_files(OSError(number, os.strerror(number), "/data/shard"))
    assert error.exit_code == 1 and "/data/shard" in str(error) and "free space" in str(error)
    assert "free space" not in str(of_files(OSError(errno.EIO, "input/output error", "x")))
    read_only = of_files(OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/page.html"))
    assert read_only.exit_code == 2 and "/data/page.html" in str(read_only)

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("core.storage.store.write_atomic", full)
    with pytest.raises(StoreError, match="free space"):
        FolderStore(tmp_path).put("x", b"")


def test_thresholds_are_the_documented_ones() -> None:
    page = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text()
    assert f"{alarms.FEW_CODES:.0%}" in page and f"{alarms.SLOWER:g} times" in page


def test_settings_of_a_dvae_hold_the_guard() -> None:
    with pytest.raises(ConfigError):
        from core.config import check

        check(DVAETrain(guard=GuardConfig(min_codebook_usage=-1)).fixed_problems())
