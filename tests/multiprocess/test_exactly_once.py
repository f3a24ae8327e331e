"""Batches over real shards, killed at random and continued by other numbers of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.support.synthetic import write_tokens
from core.keys import keyed_rng
from core.storage.store import FolderStore
from data_pipeline.formats.tokens import TokenSource
from tests.harness import ENVIRONMENT, PATIENCE, processes_with
from tests.multiprocess.readers import BATCH, stream_of

WORLDS = (8, 4, 2, 16)


@pytest.mark.slow
def test_an_epoch_is_read_once_whatever_is_killed(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    write_tokens(FolderStore(data), 4, 512, 8, grid=4, text=5)
    source = TokenSource(FolderStore(data), "train")
    everything = sorted(int(i) for block in range(256) for i in source.read(block).ids)
    unbroken = _read_with_kills(str(data), out, WORLDS, 64)
    assert sorted(i for batch in unbroken for i in batch) == everything


@pytest.mark.slow
def test_a_mixture_of_three_sets_is_read_as_unbroken_whatever_is_killed(tmp_path: Path) -> None:
    """Shares of 32 a batch: 16, 9.6 and 6.4; 320, 192 and 128 pairs in 20 steps."""
    out, first = tmp_path / "out", {}
    out.mkdir()
    for name, shards in (("a", 2), ("b", 3), ("c", 1)):
        write_tokens(FolderStore(tmp_path / name), shards, 64, 4, grid=4, text=5, seed=name)
        source = TokenSource(FolderStore(tmp_path / name), "train")
        first[name] = {int(i) for block in range(shards * 16) for i in source.read(block).ids}
    data = f"{tmp_path}/a:0.5,{tmp_path}/b:0.3,{tmp_path}/c:0.2"
    batches = _read_with_kills(data, out, (4, 2, 8), 20)
    counts = [
        {name: sum(i in ids for i in batch) for name, ids in first.items()} for batch in batches
    ]
    assert all(row["a"] == 16 and row["b"] in (9, 10) and row["c"] in (6, 7) for row in counts)
    for name, read in (("a", 320), ("b", 192), ("c", 128)):
        assert sum(row[name] for row in counts) == read
    for name in ("a", "c"):  # more than an epoch
        assert first[name] <= {i for batch in batches for i in batch}


def _read_with_kills(data: str, out: Path, worlds: Sequence[int], steps: int) -> list[list[int]]:
    """Read with kills at random steps; the batches, which are checked to be the unbroken ones."""
    part = steps // len(worlds)
    for attempt in range(len(worlds)):
        last = attempt == len(worlds) - 1
        late = int(keyed_rng(attempt, "kill").integers(part // 2))
        until = None if last else part // 2 + part * attempt + late
        _run_and_kill(data, out, worlds, attempt, until, steps)
    read = _batches(out, worlds)
    stream = iter(stream_of(data))
    unbroken = [next(stream)[0].ids.tolist() for _ in range(steps)]
    assert [read[step] for step in sorted(read)] == unbroken
    assert {len(batch) for batch in unbroken} == {BATCH}
    return unbroken


def _run_and_kill(
    data: str, out: Path, worlds: Sequence[int], attempt: int, until: int | None, steps: int
) -> None:
    """Run the job; kill -9 all of it once it has saved a step and a little more."""
    command = [sys.executable, "-m", "tests.multiprocess.readers", data, str(out)]
    with open(out / "log", "ab") as log:
        process = subprocess.Popen(
            [*command, str(attempt), str(worlds[attempt]), str(steps)],
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


def _batches(out: Path, worlds: Sequence[int]) -> dict[int, list[int]]:
    """The global batch of every step; two attempts must read the same batch at a step."""
    by_step: dict[int, dict[int, list[list[int]]]] = defaultdict(dict)
    for path in sorted(out.glob("read-*.jsonl")):
        attempt = int(path.name.split("-")[1])
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # a kill may truncate the last line
                row = json.loads(line)
                by_step[row["step"]].setdefault(attempt, [[] for _ in range(worlds[attempt])])
                by_step[row["step"]][attempt][row["rank"]] = row["ids"]
    batches: dict[int, list[int]] = {}
    for step, attempts in by_step.items():
        whole = [[i for part in parts for i in part] for parts in attempts.values() if all(parts)]
        assert whole and all(batch == whole[0] for batch in whole), step
        batches[step] = whole[0]
    return batches
