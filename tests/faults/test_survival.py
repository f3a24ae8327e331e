"""A supervised run survives faults of its ranks and ends with the same numbers."""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkpoint.reader import finished_steps
from cluster.object_server import ObjectServer
from core.errors import Preempted, RankError
from core.log import LOG
from core.storage.s3 import S3Store
from parallel.config import EngineConfig, MeshConfig
from tests.faults.conftest import Record
from tests.faults.plants import changed, train_with
from tests.harness import rows_of
from training.config import PriorTrain
from training.presets import prior_tiny
from training.recovery.replay import replay

ENGINE: Any = os.environ.get("TAPIR_FAULTS_ENGINE", "reference")
"""`make faults-torch` gives another one."""
COMPARED = ("step", "epoch", "loss", "text_loss", "image_loss", "grad_norm", "lr")
Make = Callable[..., PriorTrain]
Same = Callable[..., None]


@pytest.fixture
def make(tokens: Path, tmp_path: Path) -> Make:
    """Settings of a short run on two ranks of the reference engine, or of the asked one."""

    def build(out: str = "run", **parts: dict[str, Any]) -> PriorTrain:
        settings = replace(
            prior_tiny(),
            data=str(tokens),
            out=tmp_path / out,
            mesh=MeshConfig(data=2),
            engine=EngineConfig(name=ENGINE),
        )
        small = {
            "model": {"dim": 48, "layers": 2},
            "engine": {"precision": "fp32", "matmul_precision": "highest"},  # auto chooses by times
            "loop": {
                "steps": 24,
                "global_batch_size": 32,
                "log_every": 1,
                "validate_every": 0,
                "validation_samples": 32,
            },
            "checkpoint": {"every": 5},
            "supervisor": {"backoff_seconds": 0.1},
        }
        for name, fields in parts.items():
            small[name] = {**small.get(name, {}), **fields}
        return changed(settings, **small)

    return build


@pytest.fixture
def messages() -> list[str]:
    """Messages that the supervisor logs."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Keep()
    LOG.addHandler(handler)
    yield texts  # type: ignore[misc]
    LOG.removeHandler(handler)


def _figures(run: Path) -> list[list[float]]:
    return [[row[name] for name in COMPARED] for row in rows_of(run)]


def _weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken() -> dict[str, tuple[list[list[float]], bytes]]:
    """Figures and weights of runs without faults, by their settings."""
    return {}


@pytest.fixture
def same(make: Make, unbroken: dict[str, tuple[list[list[float]], bytes]]) -> Callable[..., None]:
    """Assert that the run equals one without faults, bit for bit."""

    def check(settings: PriorTrain, **parts: dict[str, Any]) -> None:
        key = json.dumps(parts, sort_keys=True)
        if key not in unbroken:
            other = make("unbroken", **parts)
            train_with("nothing", other)
            unbroken[key] = _figures(other.out), _weights(other.out)
        assert _figures(settings.out) == unbroken[key][0]
        assert _weights(settings.out) == unbroken[key][1]

    return check


def _ranks(count: int) -> list[int]:
    """PIDs of the ranks that this process started, once all run."""
    while True:
        pids = [p.pid for p in _children() if p.num_threads() > 3]
        if len(pids) >= count:
            return pids
        time.sleep(0.02)


def _children() -> list[psutil.Process]:
    """Children of this process's forkserver, without other tests' servers."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [child for server in servers for child in server.children()]


def _when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        while not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def _resumed(run: Path, step: int) -> Callable[[], bool]:
    return lambda: len(rows_of(run)) >= step


def _saved(run: Path) -> bool:
    """True once a checkpoint exists, so that a lost rank does not cost all steps."""
    return any(run.glob("checkpoints/*/manifest.json"))


EIGHT = {
    "mesh": {"data": 2, "tensor": 2, "pipeline": 2},
    "engine": {"name": "deepspeed_pipe", "gradient_accumulation_steps": 2},
    "model": {"dim": 48, "layers": 2, "heads": 4},
}
TORCH_EIGHT = {**EIGHT, "engine": {**EIGHT["engine"], "name": "torch"}}


@pytest.mark.world
@pytest.mark.parametrize(
    "parts", [EIGHT, pytest.param(TORCH_EIGHT, marks=pytest.mark.slow)], ids=["pipe", "torch"]
)
def test_a_killed_rank_of_eight_costs_seconds(
    make: Make, same: Same, fault: Record, parts: dict[str, Any]
) -> None:
    settings = make(**parts)
    times: list[float] = []

    def kill() -> None:
        fault(1, "SIGKILL of one of 8 ranks (TP2 x PP2 x DP2)")
        ranks = _ranks(8)
        os.kill(ranks[3], signal.SIGKILL)
        began = time.monotonic()
        deadline = time.monotonic() + 60
        while any(psutil.pid_exists(pid) for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
        before = {json.dumps(row) for row in rows_of(settings.out)}
        while json.dumps(rows_of(settings.out)[-1]) in before and time.monotonic() < deadline:
            time.sleep(0.01)
        times.append(time.monotonic() - began)

    late = _resumed(settings.out, 9)
    thread = _when(lambda: late() and _saved(settings.out), kill)
    train_with("nothing", settings)
    thread.join()
    assert times
    fault.outcome("next trained step, losses and weights bit-equal", times[0])
    same(settings, **parts)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_replaced(
    make: Make, same: Same, fault: Record, messages: list[str]
) -> None:
    settings = make(supervisor={"stopped_seconds": 2.0})

    def stop() -> None:
        fault(2, "SIGSTOP of a rank")
        os.kill(_ranks(2)[1], signal.SIGSTOP)

    _when(_resumed(settings.out, 8), stop)
    train_with("nothing", settings)
    text = next(text for text in messages if "SIGSTOP" in text)
    assert "is stopped (SIGSTOP) since 2 s" in text and "stack of rank" in text
    assert list((settings.out / "hang").glob("stacks-*.txt"))
    fault.outcome("rank and stack named, restarted, bit-equal")
    same(settings)


@pytest.mark.world
def test_a_frozen_rank_is_detected_by_its_silence(
    make: Make, same: Same, fault: Record, messages: list[str]
) -> None:
    fault(2, "a rank sleeps for ever")
    settings = make(supervisor={"hang_seconds": 4.0})
    train_with("freeze", settings, at=8, rank=1)
    text = next(text for text in messages if "hangs" in text)
    assert "rank 1 of 2 hangs" in text and "in act" in text, text
    first = "all_gather_into_tensor" if ENGINE == "torch" else "all_reduce"
    assert f"rank 0: after step 7, last in {first} over data" in text, text
    assert "last collective of rank 1: gloo:" in text, text
    assert len(list((settings.out / "hang").glob("flight-*.json"))) == 2
    fault.outcome("rank, line and collective named, restarted, bit-equal")
    same(settings)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 77])
def test_a_collective_that_does_not_match_is_reported(
    make: Make, same: Same, fault: Record, messages: list[str], size: int
) -> None:
    fault(3, "a collective of another size" if size else "a collective that others leave out")
    settings = make(supervisor={"hang_seconds": 4.0})
    train_with("skip_collective", settings, at=8, rank=1, size=size)
    text = next(text for text in messages if "start again" in text)
    assert "rank 1" in text or "rank 0" in text
    assert "all_reduce" in text, text
    fault.outcome("rank and operation named, restarted, bit-equal")
    same(settings)


@pytest.mark.world
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_saves_and_ends_with_75(
    make: Make, same: Same, fault: Record, how: signal.Signals
) -> None:
    settings = make(checkpoint={"every": 1000})

    def ask() -> None:
        fault(5, f"{how.name} to the launcher")
        os.kill(os.getpid(), how)

    _when(_resumed(settings.out, 8), ask)
    with pytest.raises(Preempted, match="with a checkpoint saved") as raised:
        train_with("nothing", settings)
    assert raised.value.exit_code == 75
    fault.outcome("step finished, saved, exit code 75; resumed bit-equal")
    train_with("nothing", settings)
    same(settings)


@pytest.mark.slow
def test_a_stop_request_while_ranks_start_is_kept(make: Make) -> None:
    settings = make()
    _when(lambda: bool(_children()), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        train_with("nothing", settings)
    assert len(rows_of(settings.out)) <= 1
    train_with("nothing", settings)
    assert len(rows_of(settings.out)) == 24


@pytest.mark.world
def test_a_crash_loop_stops_with_its_reason(make: Make, fault: Record) -> None:
    fault(6, "the same step raises on every start")
    settings = make(supervisor={"max_restarts": 2})
    with pytest.raises(RankError, match=r"(?s)3 failures in a row after step 7.*planted crash"):
        train_with("crash", settings, at=8)
    fault.outcome("given up after 2 restarts, reason stated")


@pytest.mark.world
def test_a_gradient_that_is_not_finite_on_one_rank(make: Make, fault: Record) -> None:
    fault(14, "a loss that is not a number on one rank")
    settings = make()
    train_with("not_finite", settings, at=9, rank=1)
    rows = rows_of(settings.out)
    assert [row["step"] for row in rows if "skipped" in row] == [9]
    assert rows[8]["grad_norm"] == "inf" and all(math.isfinite(row["loss"]) for row in rows[9:])
    capsule = json.loads((settings.out / "capsules" / "step-9.json").read_text())
    assert "not finite" in capsule["reason"] and len(capsule["records"]) == 32
    again = replay(settings.out / "capsules" / "step-9.json")
    assert again.same_records and not again.skipped and math.isfinite(again.loss)
    fault.outcome("all ranks skip together, counted, capsule written")


GUARD = {"guard": {"window": 16, "rewind_after": 3}, "optim": {"warmup": 2}}


ENGINES = {
    "reference": {"engine": {"name": "reference"}},
    "zero": {"engine": {"name": "deepspeed_zero", "gradient_accumulation_steps": 2}},
    "torch": {"engine": {"name": "torch", "gradient_accumulation_steps": 2}},
    "pipe": {
        "mesh": {"data": 1, "pipeline": 2},
        "engine": {"name": "deepspeed_pipe", "gradient_accumulation_steps": 2},
    },
    "torch pipe": {
        "mesh": {"data": 1, "pipeline": 2},
        "engine": {
            "name": "torch",
            "gradient_accumulation_steps": 2,
            "schedule": "zero-bubble",
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_spike_is_skipped_and_a_row_of_spikes_is_rewound(
    make: Make, fault: Record, engine: str
) -> None:
    """One spike is skipped; three in a row rewind and skip their data.

    All checkpoints are kept, because after a late save the replay starts from an older one."""
    fault(15, f"a batch's loss times 10,000, then three in a row ({engine})")
    kept = {"checkpoint": {"every": 5, "keep": 9}}
    settings = make(**GUARD, **ENGINES[engine], **kept, loop={"steps": 26, "global_batch_size": 16})
    train_with("spike", settings, batches=[11, 17, 18, 19])
    rows = rows_of(settings.out)
    assert [row["step"] for row in rows] == list(range(1, 27))
    assert [row["step"] for row in rows if "skipped" in row] == [12]
    assert "standard deviations above" in rows[11]["skipped"]
    again = replay(settings.out / "capsules" / "step-12.json")
    assert again.loss == pytest.approx(again.loss_then / 1e4, rel=1e-4), "the plant is not there"
    assert again.worst[0][1] > again.loss > 0
    assert all(row["loss"] < 10 for row in rows if "skipped" not in row)
    start = settings.out / "checkpoints" / "step-26" / "manifest.json"
    facts = json.loads(start.read_text())["facts"]
    counted = [row["loss"] for row in rows if "skipped" not in row][-16:]
    assert facts["guard"]["losses"] == pytest.approx(counted, rel=1e-6)
    stream = facts["stream"]
    assert stream["passed"] == [[0, 17], [0, 18], [0, 19]]
    fault.outcome("skipped at 6 sigma; rewound, their data passed over")


@pytest.mark.slow
def test_rewinds_without_success_end_the_run(make: Make) -> None:
    settings = make(**GUARD, loop={"steps": 26, "global_batch_size": 16})
    with pytest.raises(RankError, match="3 rewinds and other data did not help") as raised:
        train_with("spike", settings, batches=list(range(15, 40)))
    assert not raised.value.retry


@pytest.mark.world
def test_a_flipped_weight_names_its_rank(
    make: Make, same: Same, fault: Record, messages: list[str]
) -> None:
    fault(16, "a bit of a weight flips on one of 4 replicas")
    settings = make(mesh={"data": 4}, guard={"compare_every": 2})
    train_with("flip", settings, at=13, rank=2)
    assert any("weights of rank 2 differ" in text for text in messages)
    fault.outcome("named within 2 steps, restarted, bit-equal")
    same(settings, mesh={"data": 4}, guard={"compare_every": 2})


@pytest.mark.world
def test_a_run_with_checkpoints_in_an_object_store(
    make: Make, same: Same, s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint is damaged, so the run continues from the one before."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place = f"runs/{tmp_path.name}"
    settings = make(checkpoint={"every": 5, "to": f"s3://tapir-tests/{place}"})
    train_with("nothing", settings)
    whole = _weights(settings.out)
    store = S3Store("tapir-tests", place)
    assert finished_steps(store) == [20, 24]
    name = "step-24/rank-00000.safetensors"
    store.put(name, store.get(name)[:-8])
    (settings.out / "model.safetensors").unlink()
    train_with("nothing", settings)
    assert _weights(settings.out) == whole and len(rows_of(settings.out)) == 24
    assert not (settings.out / "checkpoints").exists()
    same(settings)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tapir-test", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs: run the tests as root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.world
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_stops_no_training(
    make: Make, same: Same, fault: Record, tiny_disk: Path, background: bool
) -> None:
    """The disk fills up after the first checkpoint and is freed before the last."""
    fault(10, f"the disk of the checkpoints is full ({'back' if background else 'fore'}ground)")
    where = {"every": 5, "keep": 1, "to": str(tiny_disk), "async_save": background}
    settings = make(checkpoint=where)
    ballast = tiny_disk / "ballast"
    _when(lambda: (tiny_disk / "step-5" / "manifest.json").exists(), lambda: _fill(ballast))
    _when(_resumed(settings.out, 19), ballast.unlink)
    train_with("nothing", settings)
    failed = [row["save_error"] for row in rows_of(settings.out) if "save_error" in row]
    assert failed and all("No space left on device" in text for text in failed)
    fault.outcome("each failed save told, older kept, the run ends")
    same(settings)


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_the_best_of_the_validated_checkpoints_is_kept(make: Make) -> None:
    """The best one is in the middle: from step 14 on the learning rate is 1, which moves weights
    of 0.1 by about 1 a step, so the two validations after that cannot be the best."""
    jump = {"lr": 2e-3, "warmup": 12, "final_lr": 1.0, "decay_fraction": 0.5}
    where = {"every": 3, "keep": 1, "best": True}
    settings = make(
        loop={"validate_every": 6}, checkpoint=where, optim=jump, guard={"sigma_factor": 0.0}
    )
    train_with("nothing", settings)
    losses = {row["step"]: row["loss"] for row in rows_of(settings.out, "validation")}
    rates = {row["step"]: row["lr"] for row in rows_of(settings.out)}
    assert rates[12] == 2e-3 and rates[14] == 1.0
    assert list(losses) == [6, 12, 18, 24] and min(losses, key=losses.__getitem__) == 12, losses
    names = sorted(path.name for path in (settings.out / "checkpoints").iterdir())
    assert names == ["step-12", "step-24"]


@pytest.mark.slow
def test_a_straggler_is_named(make: Make) -> None:
    settings = make(mesh={"data": 4}, loop={"steps": 6})
    train_with("slow", settings, rank=2, seconds=0.5)
    rows = rows_of(settings.out)[1:]
    assert {row["slowest_rank"] for row in rows} == {2}
    assert all(row["slowest_ratio"] > 1.5 for row in rows)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(
    make: Make, same: Same, fault: Record, messages: list[str]
) -> None:
    """Steps are slower than the watchdog's limit: it would fire if it used the wall clock."""
    fault(28, "the clock goes back a day and forward two")
    settings = make(supervisor={"hang_seconds": 10.0})
    train_with("clock", settings, at=6, back=22, seconds=0.8)
    assert not [text for text in messages if "start again" in text]
    fault.outcome("bit-equal, no watchdog woke")
    same(settings)
