"""Kill or stop any rank of any layout: it is named, all ranks end soon, no process remains.

TAPIR_LOST_RANKS=all (part of `make soak`) takes every rank of every layout, by both signals.
"""

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from bench.parity import CASES
from cluster.launcher import launch
from core.errors import RankError
from core.keys import key_int
from parallel.engines.registry import modules_of

EVERYTHING = os.environ.get("TAPIR_LOST_RANKS") == "all"
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
SECONDS = 30.0
"""From the signal to the end of the last rank."""
ALL = [(case, rank, how) for case in CASES for rank in range(case.mesh.world) for how in SIGNALS]
SOME = [
    next(row for row in ALL if row[0].name == name and row[1:] == (rank, how))
    for name, rank, how in (
        ("DP2 reference", 0, signal.SIGKILL),
        ("TP2xPP2xDP2 pipe", 5, signal.SIGKILL),
        ("TP2xDP2 ZeRO-3", 2, signal.SIGSTOP),
        ("paper layout, 2 nodes of 2", 3, signal.SIGKILL),
        ("2 nodes of 2 torch", 1, signal.SIGSTOP),
        ("TP2xDP2 torch", 2, signal.SIGKILL),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rank", "how"),
    ALL if EVERYTHING else SOME,
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_lost_rank_ends_all(case, rank: int, how: signal.Signals, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ranks = case.mesh.world
    payload = json.dumps({**asdict(replace(case, steps=10**6)), "out": str(tmp_path)})
    modules = modules_of(case.engine.name, ranks > case.mesh.data)
    lost: list[float] = []

    def lose() -> None:
        paths = [tmp_path / f"pid-{i}" for i in range(ranks)]
        while not all(path.exists() for path in paths):
            time.sleep(0.05)
        time.sleep(key_int(ranks, rank, case.name, how.name) % 8000 / 1000)
        lost.append(time.monotonic())
        os.kill(int(paths[rank].read_text()), how)

    thread = threading.Thread(target=lose)
    thread.start()
    named = f"rank {rank} of {ranks} (died|is stopped) \\({how.name}\\)"
    with pytest.raises(RankError, match=named):
        launch(
            "tests.multiprocess.training.worlds:train_case",
            payload,
            ranks,
            [*modules, "bench.parity"],
        )
    thread.join()
    assert time.monotonic() - lost[0] < SECONDS
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    assert not any(psutil.pid_exists(pid) and _runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
