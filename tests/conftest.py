"""Small data sets and models that many tests share; made once a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.object_server import ObjectServer, find_weed, object_server
from core.errors import ConfigError
from tests.harness import tapir

os.environ["OMP_NUM_THREADS"] = "1"  # before the first forkserver: worlds of 8 share 2 cores


def _folder(name: str, factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A folder for shared data, and whether `make mutants` has filled it already."""
    made = os.environ.get("TAPIR_TEST_DATA")
    return (Path(made, f"{name}0"), True) if made else (factory.mktemp(name), False)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 packed shapes in three train shards."""
    folder, made = _folder("raw", tmp_path_factory)
    if made:
        return folder
    flags = ["--count=600", "--validation=0.15", "--shard-pairs=200", "--block=8"]
    tapir("pack", "shapes", str(folder), *flags)
    return folder


@pytest.fixture(scope="session")
def bpe(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the packed captions."""
    folder, made = _folder("bpe", tmp_path_factory)
    if made:
        return folder
    tapir("train", "bpe", "tiny", f"--data={raw}", f"--out={folder}")
    return folder


@pytest.fixture(scope="session")
def dvae(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dVAE after a few steps."""
    folder, made = _folder("dvae", tmp_path_factory)
    if made:
        return folder
    short = ["--loop.steps=6", "--loop.batch=32", "--mesh.data=1"]
    tapir("train", "dvae", "tiny", f"--data={raw}", f"--out={folder}", *short)
    return folder


@pytest.fixture(scope="session")
def tokens(raw: Path, bpe: Path, dvae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of the packed shapes."""
    folder, made = _folder("tokens", tmp_path_factory)
    if made:
        return folder
    flags = [f"--bpe={bpe}", f"--dvae={dvae}", "--block=8"]
    tapir("tokenize", str(raw), str(folder), *flags)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A real SeaweedFS on loopback."""
    try:
        find_weed()
    except ConfigError as missing:  # `make install` brings it; the machine of `make py312` lacks it
        pytest.skip(str(missing))
    with object_server(tmp_path_factory.mktemp("weed"), "tapir-tests") as server:
        yield server
