"""The profile of real ranks: its sums, equal losses with and without it, traces on demand."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.config import to_json
from parallel.config import EngineConfig, MeshConfig
from tests.harness import rows_of, tapir
from training.presets import prior_tiny
from training.profiling.categories import BUBBLE, CATEGORIES, COMPUTE, DATA, OPTIMIZER, PIPELINE
from training.profiling.ring import read_rings
from training.profiling.trace import request_trace, traces

STEPS = 12
FLAGS = [
    f"--loop.steps={STEPS}",
    "--loop.global-batch-size=32",
    "--loop.log-every=3",
    "--loop.validation-samples=32",
    "--engine.precision=fp32",
    "--model.layers=2",
    "--checkpoint.every=5",
]
ZERO3 = ["--engine.name=deepspeed_zero", "--engine.zero-stage=3", "--mesh.data=2"]
PIPE = [
    "--engine.name=deepspeed_pipe",
    "--mesh.data=1",
    "--mesh.pipeline=2",
    "--engine.gradient-accumulation-steps=4",
]
RUNS = {
    "off": [*ZERO3, "--profile.no-always"],
    "on": [*ZERO3, "--profile.steps=4:5", "--profile.ranks=1"],
    "pipe": [*PIPE, "--mesh.data=1"],
}


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    tiny = prior_tiny()
    settings = replace(
        tiny,
        loop=replace(tiny.loop, steps=STEPS),
        mesh=MeshConfig(pipeline=2),
        engine=EngineConfig(name="deepspeed_pipe", gradient_accumulation_steps=4),
    )
    body = json.dumps({"stage": "prior", **to_json(settings)})
    (folders["pipe"] / "config.json").write_text(body)
    request_trace(folders["pipe"], 2, [1, 0])
    for name, flags in RUNS.items():
        run = ["train", "prior", "tiny", f"--data={tokens}", f"--out={folders[name]}"]
        tapir(*run, *FLAGS, *flags)
    return folders


def _events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
        return events


@pytest.mark.slow
def test_losses_are_the_same_with_and_without(runs: dict[str, Path]) -> None:
    on, off = rows_of(runs["on"]), rows_of(runs["off"])
    fields = ("step", "loss", "grad_norm", "text_loss", "image_loss")
    assert [[r[f] for f in fields] for r in on] == [[r[f] for f in fields] for r in off]
    assert "time" in on[-1] and "time" not in off[-1]
    assert "holds no profile" in tapir("profile", str(runs["off"]), code=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["on", "pipe"])
def test_all_time_of_every_rank_is_in_a_category(name: str, runs: dict[str, Path]) -> None:
    """The time between two steps' ends is the sum of the categories."""
    rings = read_rings(runs[name])
    assert [ring.rank for ring in rings] == [0, 1]
    for ring in rings:
        assert list(ring.steps) == list(range(1, STEPS + 1))
        booked = ring.seconds[1:].sum()
        assert booked == pytest.approx(ring.times[-1] - ring.times[0], rel=0.02)
    row = rows_of(runs[name])[-1]
    assert set(row["time"]) == set(CATEGORIES)
    assert row["time"][COMPUTE] > 0 and row["time"][OPTIMIZER] > 0
    assert row["mfu"] == pytest.approx(row["model_tflops"] / row["peak_tflops"])


@pytest.mark.slow
def test_collectives_are_timed_by_group_and_operation(runs: dict[str, Path]) -> None:
    row = rows_of(runs["on"])[-1]
    counted = {(g, op) for g, part in row["comm"].items() for op in part}
    timed = {(g, op) for g, part in row["comm_seconds"].items() for op in part}
    assert counted <= timed and ("data", "all_gather_into_tensor") in counted
    assert all(row["comm_seconds"][g][op] > 0 for g, op in counted)
    assert row["time"][DATA] > 0 == row["time"][BUBBLE]


@pytest.mark.slow
def test_a_pipeline_has_a_bubble(runs: dict[str, Path]) -> None:
    text = tapir("profile", str(runs["pipe"]), "--json")
    report = next(json.loads(line) for line in text.splitlines() if line.startswith("{"))
    time = report["time"]
    assert time[BUBBLE]["mean"] > 0.1 * time[COMPUTE]["mean"] and time[PIPELINE]["mean"] > 0
    named = {(row["group"], row["operation"]) for row in report["collectives"]}
    assert ("pipeline", "recv") in named and ("pipeline", "send") in named
    assert all(row["calls"] > 0 for row in report["collectives"]) and report["missing"] == []
    assert "own work of each rank" in text and "rank     1 " in text


@pytest.mark.slow
def test_traces_are_of_the_steps_and_ranks_asked_for(runs: dict[str, Path]) -> None:
    (flags,) = traces(runs["on"])
    assert (flags.parent.name, flags.name.split(".")[0]) == ("trace-4-5", "rank-1")
    names = {event.get("name", "") for event in _events(flags)}
    expected = ("compute", "optimizer", "all_gather_into_tensor over data")
    assert {f"tapir: {name}" for name in expected} <= names
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert "ui.perfetto.dev" in tapir("profile", str(runs["on"]), "--trace")


@pytest.mark.slow
def test_all_ranks_start_a_requested_trace_at_the_same_step(runs: dict[str, Path]) -> None:
    asked = traces(runs["pipe"])
    assert {path.parent.name for path in asked} == {"trace-4-5"}
    assert {path.name.split(".")[0] for path in asked} == {"rank-0", "rank-1"}
    assert not (runs["pipe"] / "profile" / "request.json").exists()


@pytest.mark.slow
def test_tensorboard_has_the_speed(runs: dict[str, Path]) -> None:
    events = EventAccumulator(str(runs["on"] / "tensorboard")).Reload()
    for tag in ("train/mfu", "train/tokens_per_second", "time/data", "validation/loss"):
        assert [event.step for event in events.Scalars(tag)][-1] == STEPS
