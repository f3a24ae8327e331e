"""A run that ends: no orphans, one owner of a folder, the same settings on resume."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.harness import PATIENCE, rows_of, start_tapir, tapir

FLAGS = [
    "--loop.steps=30",
    "--loop.global-batch-size=32",
    "--model.layers=1",
    "--loop.log-every=1",
    "--checkpoint.every=7",
    "--loop.validate-every=20",
    "--loop.validation-samples=32",
    "--engine.precision=fp32",
    "--engine.matmul-precision=highest",  # auto chooses by times
    f"--engine.name={os.environ.get('TAPIR_FAULTS_ENGINE', 'deepspeed_zero')}",
]


def _wait_for(condition, seconds: float = PATIENCE) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)


@pytest.mark.world
def test_without_restarts_a_lost_rank_ends_the_run(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "prior", "tiny", f"--data={tokens}", f"--out={run}"]
    command += ["--loop.steps=5000", "--supervisor.max-restarts=0", *FLAGS[1:]]
    process = start_tapir(*command, log=tmp_path / "log")
    _wait_for(lambda: len(rows_of(run)) > 1)
    ranks = _ranks_of(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    assert process.wait(30) == 1
    assert "rank 1 of 2 died (SIGKILL) at step" in (tmp_path / "log").read_text()
    _wait_for(lambda: not any(_alive(pid) for pid in ranks), 10)


@pytest.mark.world
@pytest.mark.parametrize(
    ("how", "group"),
    [
        (signal.SIGINT, True),
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        (signal.SIGUSR1, True),
        (signal.SIGKILL, False),
    ],
)
def test_no_orphans_however_the_launcher_ends(
    tokens: Path, tmp_path: Path, how: signal.Signals, group: bool
) -> None:
    flags = ["--loop.steps=5000", *FLAGS[1:]]
    run = tmp_path / "run"
    command = ["train", "prior", "tiny", f"--data={tokens}", f"--out={run}", *flags]
    process = start_tapir(*command, log=tmp_path / "log")
    _wait_for(lambda: len(rows_of(run)) > 2)
    ranks = _ranks_of(process.pid)
    if group:  # as a terminal's Ctrl-C, timeout(1) and systemd do
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    code = process.wait(PATIENCE)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130}.get(how, 75)
    _wait_for(lambda: not any(_alive(pid) for pid in ranks), 15)


@pytest.mark.world
def test_two_runs_on_one_folder_and_changed_settings(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "prior", "tiny", f"--data={tokens}", f"--out={run}", *FLAGS]
    process = start_tapir(*command, log=tmp_path / "log")
    _wait_for(lambda: len(rows_of(run)) > 8)
    os.killpg(process.pid, signal.SIGSTOP)
    assert "another run is working in" in tapir(*command, code=2)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(PATIENCE) == 0
    text = tapir(*command, "--model.dim=96", "--optim.lr=0.1", code=2)
    assert re.search(r"setting +in the checkpoint +now", text)
    assert re.search(r"model.dim +192 +96\n", text) and re.search(r"optim.lr +0.002 +0.1\n", text)
    assert "has all 30 steps already" in tapir(*command)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"[1, 2]\n\x00\xff garbage\n")
    model = run / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-9])
    tapir(*command)
    assert model.read_bytes() == whole, "a damaged model is made again from its checkpoint"


def _ranks_of(launcher: int) -> list[int]:
    import psutil

    children = psutil.Process(launcher).children(recursive=True)
    return [p.pid for p in children if p.num_threads() > 3]


def _alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
