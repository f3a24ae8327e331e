"""The token job: several workers, killed ones, doubled ones; the same bytes as one worker."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.files.atomic import TEMPORARY
from core.storage.store import FolderStore
from tests.harness import ENVIRONMENT, PATIENCE, start_tapir, tapir


def _bytes(folder: Path) -> dict[str, bytes]:
    store = FolderStore(folder)
    return {name: store.get(name) for name in store.names()}


@pytest.mark.slow
def test_workers_killed_and_doubled_give_the_same_bytes(
    raw: Path, bpe: Path, dvae: Path, tokens: Path, tmp_path: Path
) -> None:
    job = ["tokenize", str(raw), str(tmp_path / "t"), f"--bpe={bpe}", f"--dvae={dvae}", "--block=8"]
    log = tmp_path / "log"
    killed = start_tapir(*job, "--worker=0/2", log=log)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "t" / "train").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    both = [start_tapir(*job, f"--worker={i}", log=log) for i in ("0/2", "1/2", "0/2")]
    assert [process.wait(PATIENCE) for process in both] == [0, 0, 0]
    assert _bytes(tmp_path / "t") == _bytes(tokens)
    assert "made 0 shards" in tapir(*job, "--worker=1/2")


@pytest.mark.world
def test_another_worker_ends_what_a_killed_finisher_left(
    raw: Path, bpe: Path, dvae: Path, tokens: Path, tmp_path: Path
) -> None:
    job = [str(raw), str(tmp_path / "t"), f"--bpe={bpe}", f"--dvae={dvae}", "--block=8"]
    reached, log = tmp_path / "reached", tmp_path / "log"
    command = [sys.executable, "-P", "-m", "tests.multiprocess.stalls", str(reached), *job]
    killed = subprocess.Popen(command, env=ENVIRONMENT)
    try:
        _wait(reached)
        assert (tmp_path / "t/train/index.safetensors").exists()
        assert not (tmp_path / "t/train/manifest.json").exists()
        other = start_tapir("tokenize", *job, log=log)
        lease = next((tmp_path / "t/train/_leases").iterdir()).read_bytes()
        assert json.loads(lease)["holder"]["pid"] == killed.pid
    finally:
        killed.kill()
        killed.wait()
    assert other.wait(PATIENCE) == 0, log.read_text()
    for leftover in (tmp_path / "t/train").glob(f"{TEMPORARY}*"):
        leftover.unlink()
    assert _bytes(tmp_path / "t") == _bytes(tokens)


def _wait(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.world
def test_damaged_tokens_are_mended_and_other_pairs_refused(
    raw: Path, bpe: Path, dvae: Path, tokens: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "t"
    shutil.copytree(tokens, copy)
    job = ["tokenize", str(raw), str(copy), f"--bpe={bpe}", f"--dvae={dvae}", "--block=8"]
    shard = next((copy / "train").glob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    assert "made 1 shards" in tapir(*job, "--again")
    assert _bytes(copy) == _bytes(tokens)
    other = tmp_path / "other"
    tapir("pack", "shapes", str(other), "--count=60", "--validation=0.3", "--seed=5")
    job[1] = str(other)
    assert "holds tokens of other pairs" in tapir(*job, code=2)


@pytest.mark.seconds
def test_tokens_of_another_dvae_are_refused(
    raw: Path, bpe: Path, dvae: Path, tokens: Path, tmp_path: Path
) -> None:
    job = ["tokenize", str(raw), str(tokens), f"--bpe={bpe}", f"--dvae={dvae}", "--block=16"]
    assert "of another dVAE, tokenizer, block size" in tapir(*job, code=2)
    job[-1:] = ["--block=8", "--precision=bf16"]
    assert "of another dVAE, tokenizer, block size" in tapir(*job, code=2)
