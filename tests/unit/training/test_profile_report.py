"""`tapir profile`: reads run folders, whole and damaged, plans and its own flags."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.profile import profile
from core.config import to_json
from core.errors import EXIT_WRONG_INPUT, ConfigError, InputError, TapirError
from data_pipeline.config import OrderConfig
from models.counts import prior_parameters
from parallel.config import MeshConfig
from training.config import PriorTrain
from training.presets import prior_tiny
from training.profiling.categories import (
    BUBBLE,
    CATEGORIES,
    COMPUTE,
    DATA,
    OPTIMIZER,
    OTHER,
    PIPELINE,
    ProfileConfig,
)
from training.profiling.clock import HostClock, Timeline
from training.profiling.plan import read_plan
from training.profiling.report import Report, read_profile, report_of, rows_of_steps
from training.profiling.ring import HEADER, Ring
from training.profiling.trace import Tracer, request_trace

SLOT = 16 + 4 * len(CATEGORIES)


def _plan_of_run(settings: PriorTrain, **changed: Any) -> dict[str, Any]:
    """A plan file with the layout of these settings."""
    engine, mesh = settings.engine, settings.mesh
    parts = {"compute": 1.0, "compress": 0.5, "gradients": 2.0, "weights": 1.0, "update": 0.25}
    layout = {
        "mesh": dict(vars(mesh)),
        "engine": engine.name,
        "gradient_accumulation_steps": engine.gradient_accumulation_steps,
        "micro_batch": settings.loop.global_batch_size
        // mesh.data
        // engine.gradient_accumulation_steps,
        "zero_stage": engine.zero_stage,
        "recompute": engine.recompute,
        "precision": engine.precision,
        "moments": settings.optim.moments,
        "compress_rank": settings.compress.rank,
        "seconds": {**parts, "results": 0.125, "overhead": 3.0, "bubble": 4.0, "crowding": 8.0},
    }
    other = {**layout, "mesh": {**layout["mesh"], "data": 1}, "engine": "reference"}
    alternatives = [{**layout, **{k: v for k, v in changed.items() if k in layout}}]
    head = {"gpu": "h100", "parameters": prior_parameters(settings.model).total}
    whole = {**head, "best": other, "alternatives": alternatives}
    return {**whole, **{k: v for k, v in changed.items() if k in whole}}


MESHED = replace(prior_tiny(), mesh=MeshConfig(pipeline=2, data=2))
MESHED = replace(MESHED, model=replace(MESHED.model, text_vocabulary=300, image_vocabulary=64))


def test_a_plan_is_read_for_the_layout_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_plan_of_run(MESHED)))
    plan = read_plan(path, MESHED, on_gpu=True)
    expected = {COMPUTE: 9.5, DATA: 3.0, OPTIMIZER: 0.25, PIPELINE: 0.125, OTHER: 3.0, BUBBLE: 4.0}
    assert {name: value for name, value in plan.seconds.items() if value} == expected
    assert plan.gpu == "h100"


def test_a_plan_with_old_names_is_read(tmp_path: Path) -> None:
    text = json.dumps(_plan_of_run(MESHED)).replace("gradient_accumulation_steps", "accumulate")
    (tmp_path / "plan.json").write_text(text.replace('"nodes"', '"machines"'))
    assert '"machines"' in (tmp_path / "plan.json").read_text()
    assert read_plan(tmp_path / "plan.json", MESHED).gpu == "h100"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"best": None, "alternatives": []}, "none of the plan's 0 layouts"),
        ({"recompute": True}, r"nearest one has recompute True \(run: False\)"),
        ({"precision": "fp32"}, "precision fp32"),
        ({"micro_batch": 1}, "micro_batch 1"),
        ({"compress_rank": 8}, "compress_rank 8"),
        ({"parameters": 5}, "the plan's model has 5 parameters"),
        ({"gpu": "cpu"}, "is for cpu; the run was on a GPU"),
        ({"seconds": {"compute": -1.0}}, "finite and not negative"),
        ({"seconds": {"compute": float("nan")}}, "finite and not negative"),
        ({"seconds": {"compute": None}}, "is not a plan"),
    ],
)
def test_a_plan_of_something_else_is_refused(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_plan_of_run(MESHED, **changed)))
    with pytest.raises(InputError, match=words):
        read_plan(path, MESHED, on_gpu=True)


def test_what_cannot_be_profiled_is_refused(dvae: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("[]")
    for arguments, words in (
        ([str(tmp_path)], "is not a run folder .*has just been started"),
        ([str(tmp_path / "no")], r"is not a run folder \(no config.json\)"),
        ([str(dvae), "--trace"], "holds no trace"),
        ([str(dvae), "--last=-1", "--peak-tflops=nan"], "(?s)--last -1 must.*nan must be finite"),
        ([str(dvae), "--ranks", "0"], "give --trace-next 5, too"),
        ([str(dvae), "--trace", "--trace-next=1"], "give one of them"),
        ([str(dvae), "--trace", f"--plan={plan}"], "give one of them"),
        ([str(dvae), "--trace-next=1"], "has ended at step 6"),
        ([str(tmp_path), "--trace-next=1"], "is not a run folder"),
        ([str(dvae), f"--plan={plan}"], "is not a plan"),
    ):
        with pytest.raises(TapirError, match=words) as caught:
            profile(arguments)
        assert caught.value.exit_code == EXIT_WRONG_INPUT
    with pytest.raises(IsADirectoryError) as folder:
        profile([str(dvae), f"--html={tmp_path}"])
    assert folder.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{}", "is of something else"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"stage": "prior", "loop": {}}', "is damaged"),
        ('{"stage": "prior", "loop": null}', "is damaged"),
        ('{"stage": "xx", "loop": {"steps": 4}}', "of stage 'xx', not of dvae, prior, clip"),
        ('{"stage": "prior", "loop": {"steps": 4, "stpes": 1}}', "(?s)json.*'steps'.*resumes"),
        ('{"stage": "prior", "loop": {"steps": 4, "global_batch_size": "x"}}', "is damaged"),
    ],
)
def test_a_damaged_config_is_named(body: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(body)
    with pytest.raises(InputError, match=words):
        profile([str(tmp_path)])


def _run_of(folder: Path, ranks: int, steps: int, log_every: int = 1) -> Path:
    """The run folder of a prior on some ranks."""
    mesh = replace(MESHED, mesh=MeshConfig(data=ranks), order=OrderConfig(lanes=ranks))
    settings = replace(mesh, loop=replace(mesh.loop, global_batch_size=4 * ranks, steps=20))
    body = json.dumps({"stage": "prior", **to_json(settings)})
    (folder / "config.json").write_text(body)
    rows = [
        {
            "step": step,
            "seconds": 0.5,
            "tokens_per_second": 100.0,
            "comm": {"data": {"all_reduce": {"calls": step, "bytes": 8}}},
            "comm_seconds": {"data": {"all_reduce": 0.1, "all_gather": 0.2}},
            "peak_tflops": 1.0,
        }
        for step in range(log_every, steps + 1, log_every)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rank in range(ranks):
        ring = Ring(folder, rank, ranks, 0, 0)
        for step in range(1, steps + 1):
            ring.add(step, [2.0 if rank == ranks - 1 else 1.0] * len(CATEGORIES))
        ring.close()
    return folder


def _report(run: Path, last: int = 0) -> Report:
    return report_of(read_profile(run, last), 0.0, None)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "garbage", "list"])
def test_ranks_keep_their_numbers_where_one_is_missing(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run_of(tmp_path, 3, 4)
    path = run / "profile" / "rank-1.bin"
    data = path.read_bytes()
    parts = {
        "truncated": data[: HEADER + 8 * SLOT],
        "empty": data[:HEADER] + bytes(len(data) - HEADER),
        "garbage": data[:HEADER] + b"\x3f" * (len(data) - HEADER),
        "list": b"[]".ljust(HEADER) + data[HEADER:],
    }
    path.unlink()
    if damage in parts:
        path.write_bytes(parts[damage])
    report = _report(run)
    assert report.slow_ranks == {0: 0.5, 2: 2.0} and report.time[COMPUTE].slowest_rank == 2
    (text,) = report.missing
    assert "1 of 3 ranks" in text and "(rank 1)" in text
    assert any(warning.startswith("rank 2 takes 2.00 times") for warning in report.warnings)
    profile([str(run)])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())  # long paths break lines
    assert "2 of 3 ranks" in words and "! the profile of 1 of 3 ranks" in words
    assert "rank     2 " in shown and "rank     1 " not in shown


def test_ranks_without_a_common_step_are_refused(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 2, 4)
    ring = Ring(run, 1, 2, 0, 1)
    ring.close()
    later = Ring(run, 0, 2, 0, 0)
    later.add(9, [1.0] * len(CATEGORIES))
    later.close()
    with pytest.raises(InputError, match="holds no common steps"):
        read_profile(run)


def test_the_last_steps_have_their_own_rows(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 2, 12, log_every=3)
    assert [row["step"] for row in read_profile(run).rows] == [3, 6, 9, 12]
    assert [row["step"] for row in read_profile(run, 4).rows] == [9, 12]
    rows = read_profile(run).rows
    assert [row["step"] for row in rows_of_steps(rows, 2, 4)] == [3, 6]
    assert [row["step"] for row in rows_of_steps(rows, 13, 14)] == [12]
    (only,) = _report(run, 4).collectives
    assert (only.operation, only.calls) == ("all_reduce", 10.5)
    (run / "metrics.jsonl").write_text('{"step": 12}\nno row\n{"step": ' + "9" * 400 + "}\n")
    report = _report(run)
    assert report.tokens_per_second is None and report.collectives == []
    assert report.missing == ["2 lines of metrics.jsonl cannot be read: passed over"]
    (run / "metrics.jsonl").unlink()
    assert "no row of training" in _report(run).missing[0]


@pytest.mark.parametrize(
    ("steps", "ranks", "words"),
    [
        (0, [], "ask for at least 1"),
        (100_000, [], "at most 100"),
        (2, [99, 0, -1], r"no rank 99, -1; its ranks are 0 to 1"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(
    steps: int, ranks: list[int], words: str, tmp_path: Path
) -> None:
    run = _run_of(tmp_path, 2, 4)
    with pytest.raises(ConfigError, match=words):
        request_trace(run, steps, ranks)
    request_trace(run, 2, [0])
    with pytest.raises(ConfigError, match="another request waits"):
        request_trace(run, 2, [1])


def test_a_request_waits_for_the_trace_in_progress(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 2, 4)
    tracer = Tracer(
        ProfileConfig(steps="6:8", ranks="1"), run, 0, Timeline(HostClock(lambda *_: None))
    )
    request_trace(run, 3, [])
    assert [tracer.asked(step) for step in (4, 5, 7)] == [None] * 3
    assert tracer.asked(8) == {"first": 9, "last": 11, "ranks": []}
    assert tracer.asked(8) is None
