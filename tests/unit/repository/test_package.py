"""A wheel and a source distribution hold every file of the packages, shipped models included."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.house.rules import PRODUCT, WEIGHTS_BYTES
from tests.house.weights import weights

pytestmark = pytest.mark.seconds
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "tapir.py")
MODELS = [
    *("card.json", "README.md", "bpe/tokenizer.json", "bpe/words.json"),
    *(f"{name}/{file}" for name in ("prior", "dvae", "clip") for file in ("model.json",)),
    *(f"{name}/model.safetensors" for name in ("prior", "dvae", "clip")),
]
"""Files of a set of shipped models."""
NOT_INSTALLED = {"cluster/Dockerfile"}

BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # building changes it
build_meta.build_wheel(out)
build_meta.build_sdist(out)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of the packages, with two more sets of models."""
    tree = tmp_path_factory.mktemp("tree")
    packages = [name for name in PRODUCT if name != "tapir"]
    listed = subprocess.run(
        ["git", "ls-files", *NEEDED, *packages],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name in ("one-set", "another"):
        for file in MODELS:
            path = tree / "generation" / "weights" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
    return tree


def test_all_files_are_installed(tree: Path, tmp_path: Path) -> None:
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    build = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    installed = files - NOT_INSTALLED - {*NEEDED} | {"tapir.py"}
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == installed
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as source:
        names = {member.name.partition("/")[2] for member in source if member.isfile()}
    assert names >= installed | {*NEEDED}


def test_weights_that_are_too_large_are_a_problem_of_the_house(tmp_path: Path) -> None:
    assert weights(tmp_path) == [] and weights(ROOT) == []
    for name in ("shapes", "emoji"):
        path = tmp_path / "generation" / "weights" / name / "prior" / "model.safetensors"
        path.parent.mkdir(parents=True)
        with open(path, "wb") as file:
            file.truncate(WEIGHTS_BYTES // 2)
    assert weights(tmp_path) == []
    with open(path, "ab") as file:
        file.write(b"12")
    (problem,) = weights(tmp_path)
    assert "25.0 MB" in problem and "generation/weights/:1:" in problem
