"""kill -9, again and again, at random moments of one run.

Ranks are killed and start again by themselves; one kill hits the launcher, and the same command
is given again. `make soak` kills 30 times, `make test-slow` twice.
"""

import collections
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from core.heartbeat import Beat, read_beats
from core.keys import keyed_rng
from tests.faults.conftest import Record
from tests.harness import PATIENCE, rows_of, start_tapir, tapir

KILLS = int(os.environ.get("TAPIR_SOAK_KILLS", "2"))
LONG = KILLS > 2
STEPS = 50 + (100 if LONG else 40) * KILLS
COMPARED = ("step", "epoch", "loss", "text_loss", "image_loss", "grad_norm", "lr")
FLAGS = [
    f"--loop.steps={STEPS}",
    "--loop.global-batch-size=32",
    "--loop.log-every=1",
    "--loop.validate-every=20",
    "--loop.validation-samples=32",
    "--checkpoint.every=7",
    "--model.dim=96",
    "--supervisor.max-restarts=1000",
    "--supervisor.backoff-seconds=0.1",
    "--engine.precision=fp32",
    "--engine.matmul-precision=highest",  # auto chooses by times
    f"--engine.name={os.environ.get('TAPIR_FAULTS_ENGINE', 'deepspeed_zero')}",
]
LONGEST = 5.0 if LONG else 2.0
"""Most seconds between the start of all ranks and the next kill."""


@pytest.mark.slow
def test_a_run_survives_kills_at_random_moments(
    tokens: Path, tmp_path: Path, fault: Record
) -> None:
    fault(1, f"SIGKILL at {KILLS} random moments of one run")
    run, log = tmp_path / "run", tmp_path / "log"
    process = start_tapir("train", "prior", "tiny", *_flags(tokens, run), log=log)
    seen: collections.Counter[str] = collections.Counter()
    before: set[int] = set()
    for kill in range(KILLS):
        draws = keyed_rng(KILLS, kill, "soak")
        ranks = _ranks(process.pid, before)
        time.sleep(draws.uniform(0, LONGEST))
        ranks = [beat for beat in _beats(process.pid) if beat.pid in {b.pid for b in ranks}]
        victim = ranks[int(draws.integers(len(ranks)))]
        seen[victim.doing.split(" over ")[0]] += 1
        before = {beat.pid for beat in ranks}
        assert process.poll() is None, log.read_text()[-2000:]
        if kill == 1:
            process.kill()
            process.wait()
            process = start_tapir("train", "prior", "tiny", *_flags(tokens, run), log=log)
        else:
            os.kill(victim.pid, signal.SIGKILL)
    assert process.wait(PATIENCE) == 0, log.read_text()[-2000:]
    text = log.read_text()
    assert text.count("start again") == KILLS - 1
    fault.outcome(f"bit-equal; killed in {dict(seen)}")
    tapir("train", "prior", "tiny", *_flags(tokens, tmp_path / "unbroken"))
    for split in ("train", "validation"):
        rows = [rows_of(folder, split) for folder in (run, tmp_path / "unbroken")]
        compared = [[[row.get(name) for name in COMPARED] for row in part] for part in rows]
        assert compared[0] == compared[1] and compared[0]
    weights = [path / "model.safetensors" for path in (run, tmp_path / "unbroken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list(run.rglob(".tmp-*"))


def _flags(tokens: Path, out: Path) -> list[str]:
    return [f"--data={tokens}", f"--out={out}", *FLAGS]


def _ranks(launcher: int, before: set[int]) -> list[Beat]:
    """The ranks of the newest start, once both have logged."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        beats = [beat for beat in _beats(launcher) if beat.pid not in before]
        if len(beats) == 2:
            return beats
        time.sleep(0.01)
    raise AssertionError("the ranks did not start")


def _beats(launcher: int) -> list[Beat]:
    session = next(Path(tempfile.gettempdir()).glob(f"tapir-ranks-{launcher}-*"), None)
    folders = [path for path in session.iterdir() if path.is_dir()] if session else []
    return [beat for folder in folders for beat in read_beats(folder, 2) if _lives(beat.pid)]


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
