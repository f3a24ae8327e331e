"""An epoch over real shards, killed at random and continued by other numbers of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from bench.support.synthetic import write_tokens
from core.keys import keyed_rng
from core.storage.store import FolderStore
from data_pipeline.formats.tokens import TokenSource
from tests.harness import ENVIRONMENT, PATIENCE, processes_with
from tests.multiprocess.readers import open_stream

WORLDS = (8, 4, 2, 16)


@pytest.mark.slow
def test_an_epoch_is_read_once_whatever_is_killed(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    write_tokens(FolderStore(data), 4, 512, 8, grid=4, text=5)
    source = TokenSource(FolderStore(data), "train")
    everything = sorted(int(i) for block in range(256) for i in source.read(block).ids)
    for attempt, ranks in enumerate(WORLDS):
        last = attempt == len(WORLDS) - 1
        until = None if last else 8 + 14 * attempt + int(keyed_rng(attempt, "kill").integers(6))
        _run_and_kill(data, out, attempt, ranks, until)
    read = _batches(out)
    unbroken = [batch.ids.tolist() for batch, _ in _epoch(data)]
    assert [read[step] for step in sorted(read)] == unbroken and len(unbroken) == 64
    assert sorted(i for batch in unbroken for i in batch) == everything


def _epoch(data: Path) -> list[tuple]:  # type: ignore[type-arg]
    stream = open_stream(str(data))
    batches = iter(stream)
    return [next(batches) for _ in range(stream.order.steps(0))]


def _run_and_kill(data: Path, out: Path, attempt: int, ranks: int, until: int | None) -> None:
    """Run the job; kill -9 all of it once it has saved a step and a little more."""
    command = [sys.executable, "-m", "tests.multiprocess.readers", str(data), str(out)]
    with open(out / "log", "ab") as log:
        process = subprocess.Popen(
            [*command, str(attempt), str(ranks)],
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        state = out / "state.json"
        if until is not None and state.exists() and json.loads(state.read_text())["step"] >= until:
            os.killpg(process.pid, signal.SIGKILL)
            for pid in processes_with(str(out)):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    code = process.wait(10)
    assert code == (0 if until is None else -signal.SIGKILL), (out / "log").read_text()[-2000:]


def _batches(out: Path) -> dict[int, list[int]]:
    """The global batch of every step; two attempts must read the same batch at a step."""
    by_step: dict[int, dict[int, list[list[int]]]] = defaultdict(dict)
    for path in sorted(out.glob("read-*.jsonl")):
        attempt = int(path.name.split("-")[1])
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # a kill may truncate the last line
                row = json.loads(line)
                by_step[row["step"]].setdefault(attempt, [[] for _ in range(WORLDS[attempt])])
                by_step[row["step"]][attempt][row["rank"]] = row["ids"]
    batches: dict[int, list[int]] = {}
    for step, attempts in by_step.items():
        whole = [[i for part in parts for i in part] for parts in attempts.values() if all(parts)]
        assert whole and all(batch == whole[0] for batch in whole), step
        batches[step] = whole[0]
    return batches
