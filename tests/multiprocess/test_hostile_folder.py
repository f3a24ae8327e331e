"""Tapir in a folder of files named like its own modules runs none of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapir import PACKAGES, VERBS
from tests.harness import ROOT, rows_of
from tests.hostile import bare, foreign_code, hostile_folder

_SHORT = [
    "--loop.steps=2",
    "--loop.global-batch-size=32",
    "--loop.log-every=1",
    "--loop.validate-every=0",
]
_DRIVER = """
import json, sys
from tapir import main
for arguments, code in json.loads(sys.argv[1]):
    sys.argv = ["tapir", *arguments]
    try:
        main()
        ended = 0
    except SystemExit as error:
        ended = error.code or 0
    assert ended == code, (arguments, ended)
"""
"""What the console script does, for many commands in one process."""


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    folder = hostile_folder(tmp_path / "hostile")
    yield folder
    assert foreign_code(folder) == []


def run(command: list[str], cwd: Path, code: int = 0, **extra: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**bare(), **extra}, capture_output=True, text=True, timeout=300
    )
    text = done.stdout + done.stderr
    assert done.returncode == code, text[-4000:]
    return text


def beside(name: str) -> str:
    """Path of a program of this environment."""
    return str(Path(sys.executable).with_name(name))


@pytest.mark.slow
def test_every_verb_works(
    hostile: Path, raw: Path, bpe: Path, tokens: Path, dvae: Path, tmp_path: Path
) -> None:
    """Verbs of the demo, of chains and of servers are tested there by their own tests."""
    data, prior = str(raw), str(tmp_path / "prior")
    run_file = tmp_path / "run.yaml"
    stages = {"pack": {"source": "shapes"}, "prior": {"nodes": 2, "flags": {"data": str(tokens)}}}
    run_file.write_text(json.dumps({"name": "x", "out": str(tmp_path / "out"), "stages": stages}))
    small = {"source": "shapes", "flags": {"count": 30, "validation": 0.3}}
    local = tmp_path / "local.yaml"
    out = str(tmp_path / "local")
    local.write_text(json.dumps({"name": "y", "out": out, "stages": {"pack": small}}))
    where = [f"--data={tokens}", f"--out={prior}", f"--bpe={bpe}"]
    commands: list[tuple[list[str], int]] = [
        (["train", "prior", "tiny", *where, *_SHORT], 0),
        (["diverge", str(dvae), str(dvae)], 0),
        (["seen", "none", f"--run={prior}"], 2),
        (["batch", "1", f"--run={prior}"], 0),
        (["profile", prior], 0),
        (["watch", prior, "--once"], 0),
        (["verify", prior], 0),
        (["replay", f"{prior}/capsules/none"], 2),
        (["overlap", data, "cub:/none"], 2),
        (["data", data, "--sql=SELECT count(*) FROM pairs"], 0),
        (["study", "make", data, data, f"--out={tmp_path / 'study'}", "--count=2"], 0),
        (["study", "results", str(tmp_path / "study")], 0),
        (["serve", f"x={tmp_path / 'none'}", "--port=0"], 2),
        (["plan", "tiny", "--world=2"], 0),
        (["rehearse", "tiny"], 0),
        (["doctor", "--node", f"--out={out}", "--disk=0"], 0),
        (["doctor", "--quick", "--ranks=2", f"--out={out}", "--disk=0"], 0),
        (["export", str(dvae), str(tmp_path / "hub")], 0),
        (["import", str(tmp_path / "hub"), str(tmp_path / "back")], 0),
        (["submit", str(run_file), "--to=slurm", "--dry-run"], 0),
        (["submit", str(run_file), "--to=local", "--dry-run"], 0),
        (["submit", str(local), "--wait"], 0),
        (["status", out], 0),
        (["logs", out], 0),
        (["resume", out], 0),
        (["cancel", out], 0),
    ]
    text = run([sys.executable, "-P", "-c", _DRIVER, json.dumps(commands)], hostile)
    elsewhere = {
        "demo",
        "tokenize",
        "sample",
        "evaluate",
        "score",
        "report",
        "job",
        "pack",
        "serve",
    }
    assert {arguments[0] for arguments, _ in commands} | elsewhere == set(VERBS)
    assert "PYTHONSAFEPATH=1" in text and " -P -m tapir" in text


@pytest.mark.slow
def test_torchrun_joins_ranks_as_the_reference_shows_it(
    hostile: Path, tokens: Path, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    assert "`torchrun --nproc-per-node 2 --no-python tapir train" in page
    out = [f"--data={tokens}", f"--out={tmp_path / 'prior'}", *_SHORT]
    command = [beside("torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run([*command, "tapir", "train", "prior", "tiny", *out], hostile, PATH=path)
    assert [row["step"] for row in rows_of(tmp_path / "prior")] == [1, 2]


@pytest.mark.seconds
@pytest.mark.parametrize("left", ["{}", ":", "{}/models:{}:"])
def test_a_pythonpath_that_was_left_over_hides_nothing(tmp_path: Path, left: str) -> None:
    """Folders named like our packages are skipped, in children too; other packages still import."""
    hostile = hostile_folder(tmp_path / "hostile", only_ours=True)
    code = """
import os, subprocess, sys, tapir
try:
    tapir.main()
except SystemExit as error:
    assert error.code == 2
child = "import core.errors; print(core.errors.__file__)"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    command = [sys.executable, "-P", "-c", code, "status", str(tmp_path)]
    path = left.format(hostile, hostile)
    text = run(command, hostile, PYTHONPATH=path)
    assert "there is no token job" in text and f"{ROOT}/core/errors.py" in text
    assert foreign_code(hostile) == []


def test_all_packages_are_guarded() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "bench"} == set(PACKAGES)
