"""The writer of trackers: every figure reaches each, and none can stop a run."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.training.test_alarms import told as told  # the log's messages
from training.presets import PRESETS
from training.run.folder import RunFolder, read_metrics
from training.run.trackers import config, writer
from training.run.trackers.config import missing_libraries, track_problems
from training.run.trackers.protocol import bin_edges, scalars_of

ROWS: list[dict[str, Any]] = [
    {
        "step": 1,
        "loss": 0.1 + 0.2,
        "comm": {"data": {"all_reduce": {"bytes": 7}}},
        "precision": "fp32",
    },
    {"step": 2, "split": "validation", "loss": 2.0},
    {"step": 2, "loss": 1.0, "time": {"compute": 1 / 3}, "time_max": {"compute": [0.5, 0]}},
]
SCALARS = [
    ({"train/loss": 0.1 + 0.2, "comm/data/all_reduce/bytes": 7}, 1),
    ({"validation/loss": 2.0}, 2),
    ({"train/loss": 1.0, "time/compute": 1 / 3}, 2),
]


class Recorder:
    """A tracker that keeps what it gets."""

    opened: ClassVar[list["Recorder"]] = []

    def __init__(self, root: Path, settings: Any, step: int) -> None:
        self.begun, self.rows, self.shown, self.closed = step, list[Any](), list[Any](), False
        Recorder.opened.append(self)

    def scalars(self, values: Any, step: int) -> None:
        self.rows.append((dict(values), step))

    def picture(self, name: str, image: Any, step: int) -> None:
        self.shown.append(("picture", name, image.shape, step))

    def histogram(self, name: str, values: Any, step: int) -> None:
        self.shown.append(("histogram", name, values.tolist(), step))

    def close(self) -> None:
        self.closed = True


class FailsAtStart(Recorder):
    def __init__(self, root: Path, settings: Any, step: int) -> None:
        raise ConnectionError("no network")


class FailsLater(Recorder):
    def scalars(self, values: Any, step: int) -> None:
        raise RuntimeError(f"refused at {step}")


class Hangs(Recorder):
    def scalars(self, values: Any, step: int) -> None:
        Event().wait()


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kinds = {"recorder": Recorder, "start": FailsAtStart, "later": FailsLater, "hangs": Hangs}
    for name, kind in kinds.items():
        monkeypatch.setitem(writer.OWN, name, kind)
    yield
    Recorder.opened.clear()


def _run(root: Path, track: str) -> list[dict[str, Any]]:
    """A run of two steps with these trackers; returns its metrics.jsonl."""
    folder = RunFolder(root, {"a": 1}, True, track)
    folder.begin(0)
    folder.show("grid", np.zeros((2, 4, 3), np.uint8), 1)
    folder.show("codebook", np.array([3, 0, 3]), 1)
    for row in ROWS:
        folder.log(row)
    folder.close()
    return read_metrics(root)


def test_each_figure_picture_and_histogram_reaches_a_tracker_in_order(tmp_path: Path) -> None:
    assert _run(tmp_path, "recorder") == ROWS
    (tracker,) = Recorder.opened
    assert tracker.rows == SCALARS and tracker.begun == 0 and tracker.closed
    assert tracker.shown == [
        ("picture", "grid", (2, 4, 3), 1),
        ("histogram", "codebook", [3, 0, 3], 1),
    ]


def test_a_rewind_opens_trackers_again_after_the_step_it_went_back_to(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, True, "recorder")
    folder.begin(0)
    folder.log(ROWS[0])
    folder.begin(5)
    first, second = Recorder.opened
    assert first.closed and (first.begun, second.begun) == (0, 5)
    folder.close()
    assert second.closed and second.rows == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("start", "ConnectionError: no network"),
        ("later", "RuntimeError: refused at 1"),
        ("hangs", "it did not close within 0 s"),
    ],
)
def test_a_failed_tracker_is_told_once_and_stops_nothing(
    name: str, reason: str, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_SECONDS", 0.01 if name == "hangs" else 120.0)
    assert _run(tmp_path, f"{name},recorder") == ROWS
    monkeypatch.setattr(writer, "_SECONDS", 120.0)
    messages = [text for text in told.messages if f"tracker {name} failed" in text]
    assert len(messages) == 1 and f"({reason})" in messages[0]
    if name != "hangs":  # the other one had only as long to close
        assert next(r for r in Recorder.opened if type(r) is Recorder).rows == SCALARS


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit("no")], ids=["error", "exit"])
@pytest.mark.parametrize("call", ["scalars", "picture", "histogram", "close"])
def test_a_tracker_that_raises_at_any_call_is_told_once(
    call: str,
    error: BaseException,
    tmp_path: Path,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training goes on, and the other tracker gets all."""

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setitem(writer.OWN, "broken", type("Broken", (Recorder,), {call: fail}))
    assert _run(tmp_path, "broken,recorder") == ROWS
    messages = [text for text in told.messages if "tracker broken failed" in text]
    assert len(messages) == 1 and f"({type(error).__name__}: no)" in messages[0]
    whole = next(each for each in Recorder.opened if type(each) is Recorder)
    assert whole.rows == SCALARS and len(whole.shown) == 2 and whole.closed


def test_a_tracker_that_does_not_keep_up_is_dropped(
    tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_PENDING", 1)
    folder = RunFolder(tmp_path, {}, True, "hangs")
    folder.begin(0)
    for step in range(1, 9):
        folder.log({"step": step, "loss": 1.0})
    folder.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [*range(1, 9)]
    assert len([text for text in told.messages if "it is 1 rows behind" in text]) == 1


def test_a_package_adds_a_tracker_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "third_party_tracker-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: third-party-tracker\nVersion: 1\n"
    )
    (about / "entry_points.txt").write_text(
        "[tapir.trackers]\nmine = tests.unit.training.trackers.test_trackers:Recorder\n"
    )
    assert track_problems("mine") != []
    monkeypatch.syspath_prepend(str(tmp_path))
    assert track_problems("tensorboard,mine") == []
    opener = writer._opener("mine")
    assert opener.__name__ == "Recorder"  # type: ignore[attr-defined]


def test_tensorboard_has_the_nested_figures_too(tmp_path: Path) -> None:
    _run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()
    for values, step in SCALARS:
        for name, value in values.items():
            scalar = next(each for each in events.Scalars(name) if each.step == step)
            assert scalar.value == np.float32(value)
    assert events.Histograms("codebook")[0].histogram_value.num == 3
    assert (events.Images("grid")[0].width, events.Images("grid")[0].height) == (4, 2)


def test_unknown_trackers_and_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert track_problems("") == track_problems("tensorboard, wandb,trackio") == []
    assert "no tracker 'wandbb'; did you mean 'wandb'?" in track_problems("wandbb")[0]
    assert "known are tensorboard, wandb, trackio" in track_problems("x")[0]
    assert "given 2 times" in track_problems("wandb,wandb")[0]
    settings = PRESETS["prior"]["tiny"]()
    assert settings.track == "tensorboard" and settings.problems() == []
    monkeypatch.setitem(config.LIBRARIES, "wandb", "not_installed_here")
    (text,) = missing_libraries("tensorboard,wandb")
    assert "pip install not_installed_here" in text and "--track" in text


def test_bins_hold_every_code() -> None:
    assert bin_edges(np.array([2]), 8) == [0, 1, 2, 3]
    assert bin_edges(np.array([9, 0]), 4) == [0, 2.5, 5, 7.5, 10]
    assert scalars_of({"step": 3, "a": {"b": {"c": 1, "d": "text"}}}) == {"a/b/c": 1}
