"""Small data sets and models that many tests share; the first worker that needs one makes it."""

import multiprocessing.forkserver
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from cluster.object_server import ObjectServer, find_weed, object_server
from core.errors import ConfigError, StoreError
from core.log import LOG
from tests.harness import EVERYTHING, end_started, tapir

os.environ["OMP_NUM_THREADS"] = "1"  # before the first forkserver: worlds of 8 share 2 cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so
    signal.signal(signal.SIGINT, signal.default_int_handler)
_preload = multiprocessing.forkserver.set_forkserver_preload


def _preload_everything(names: list[str]) -> None:
    """Import all engines in the first forkserver: later ranks would each import the rest."""
    _preload([*dict.fromkeys([*EVERYTHING, *names])])


multiprocessing.forkserver.set_forkserver_preload = _preload_everything


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Remove log handlers and background runs that a test left."""
    log = LOG.handlers[:], LOG.propagate, LOG.level
    yield
    LOG.handlers[:], LOG.propagate, LOG.level = log
    end_started()


def _once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], Any]) -> Path:
    """A folder that the first of pytest-xdist's workers fills; `make mutants` brings its own."""
    if made := os.environ.get("TAPIR_TEST_DATA"):
        return Path(made, f"{name}0")
    own = factory.getbasetemp()
    root = own.parent if own.name.startswith("popen-") else own
    folder, whole = root / f"{name}0", root / f"{name}.whole"
    with FileLock(root / f"{name}.lock"):
        if not whole.exists():
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 packed shapes in three train shards."""
    flags = ["--count=600", "--validation=0.15", "--shard-pairs=200", "--block=8"]
    return _once("raw", tmp_path_factory, lambda to: tapir("pack", "shapes", str(to), *flags))


@pytest.fixture(scope="session")
def bpe(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the packed captions."""
    train = ["train", "bpe", "tiny", f"--data={raw}"]
    return _once("bpe", tmp_path_factory, lambda to: tapir(*train, f"--out={to}"))


@pytest.fixture(scope="session")
def dvae(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dVAE after a few steps."""
    train = ["train", "dvae", "tiny", f"--data={raw}"]
    train += ["--loop.steps=6", "--loop.global-batch-size=32", "--mesh.data=1"]
    return _once("dvae", tmp_path_factory, lambda to: tapir(*train, f"--out={to}"))


@pytest.fixture(scope="session")
def tokens(raw: Path, bpe: Path, dvae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of the packed shapes."""
    flags = [f"--bpe={bpe}", f"--dvae={dvae}", "--block=8"]
    return _once(
        "tokens", tmp_path_factory, lambda to: tapir("tokenize", str(raw), str(to), *flags)
    )


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A real SeaweedFS on loopback."""
    try:
        find_weed()
    except ConfigError as missing:  # installed by `make install`; `make py312` runs without it
        pytest.skip(str(missing))
    with ExitStack() as stack:
        for last in (False, False, True):
            try:
                place = tmp_path_factory.mktemp("weed")
                server = stack.enter_context(object_server(place, "tapir-tests"))
                break
            except StoreError:  # on a busy machine it may start late or lose its port
                if last:
                    raise
        yield server


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print fault -> outcome -> seconds, collected from all workers."""
    ended = [one for kind in ("passed", "failed") for one in terminalreporter.getreports(kind)]
    kept = [one for one in ended if one.when == "call"]
    rows = [value for one in kept for name, value in one.user_properties if name == "fault"]
    if rows:
        terminalreporter.section("faults")
    for number, what, outcome, seconds in sorted(map(tuple, rows)):
        terminalreporter.write_line(f"{number:>3}  {what} -> {outcome} -> {seconds:.1f} s")
