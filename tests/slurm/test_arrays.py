"""A real Slurm with MaxArraySize 10, and a run file whose paths and flags are full of quotes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import PATH, tapir
from tests.slurm.cluster import Slurm, private_slurm
from tests.slurm.conftest import refuse_without_slurm
from tests.slurm.test_slurm import finish, pack, wait_for

WORKERS = 25
ODD = 'it\'s "50%" # of $HOME `x` & more; (all) *'
"""A folder's name with what shells, sbatch and patterns of logs take for their own."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes; the numbers of an array's tasks are below 10."""
    refuse_without_slurm()
    folder = tmp_path_factory.mktemp("arrays")
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    with private_slurm(folder / "s", settings="MaxArraySize=10\n") as cluster:
        yield cluster


def write(out: Path, stages: dict[str, Any], **more: Any) -> Path:
    """A run file named `run` beside its folder."""
    path = out.with_name(f"{out.name}.yaml")
    body = {"name": "run", "out": str(out), "to": "slurm", "stages": stages, **more}
    path.write_text(yaml.safe_dump(body))
    return path


@pytest.mark.big
def test_an_array_above_the_limit_is_split(small: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "data"
    short = {"loop.global_batch_size": 32, "loop.validation_samples": 32, "mesh.data": 1}
    stages = {
        "pack": pack(),
        "bpe": {},
        "dvae": {"flags": {**short, "loop.steps": 2}},
        "tokenize": {"workers": WORKERS, "parallelism": 8, "flags": {"block": 8}},
        "prior": {"flags": {**short, "loop.steps": 2, "engine.name": "reference"}},
    }
    tapir("submit", str(write(out, stages)), **small.environment)
    jobs = [line.split("|") for line in small.ask("squeue", "-h", "-o", "%F|%j|%K|%E").split("\n")]
    arrays = {row[0]: row for row in jobs if row[1:] and row[1] == "run-tokenize"}
    assert len(arrays) == 3
    waits = next(row[3] for row in jobs if row[1:] and row[1] == "run-prior")
    assert all(f"afterok:{number}_*" in waits for number in arrays)
    by_stage = finish(small, out)
    assert set(by_stage.values()) == {"done"}, tapir("logs", str(out), **small.environment)
    expected = {f"tokenize-{i}" for i in range(WORKERS)}
    assert {path.stem for path in (out / "logs").glob("tokenize-*.log")} == expected
    assert {path.stem for path in (out / "markers").glob("tokenize-*.json")} == expected


@pytest.mark.big
def test_paths_and_flags_full_of_quotes(small: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    texts = folder / 'it\'s "these" #.txt'
    texts.write_text("a red circle\na blue square\n" * 200)
    comment = '--comment=it\'s "x" # 1 \\ $HOME `x`'
    stages = {
        "pack": pack(),
        "bpe": {"flags": {"texts": str(texts), "vocabulary": 300}},
        "dvae": {
            "nodes": 2,
            "flags": {
                "loop.global_batch_size": 32,
                "loop.validation_samples": 32,
                "loop.steps": 2,
                "mesh.data": 2,
            },
        },
        "tokenize": {"workers": 11, "flags": {"block": 8}},
    }
    path = write(folder / "out", stages, slurm={"extra": [comment]})
    tapir("submit", path.name, cwd=folder, **small.environment)
    assert f"Comment={comment.partition('=')[2]}" in small.ask("scontrol", "show", "job")
    by_stage = finish(small, folder / "out")
    log = tapir("logs", str(folder / "out"), **small.environment)
    assert set(by_stage.values()) == {"done"}, log
    assert {path.name for path in folder.iterdir()} == {"out", path.name, texts.name}
    assert len(list((folder / "out" / "logs").glob("tokenize-*.log"))) == 11


@pytest.mark.big
def test_the_printed_script_writes_the_same_files(small: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    path = write(folder / "out", {"pack": pack()})
    script = tapir("submit", path.name, "--dry-run", cwd=folder, **small.environment)
    environment = {**os.environ, **small.environment, "PYTHONPATH": PATH}
    subprocess.run(["bash"], input=script.encode(), check=True, cwd=tmp_path, env=environment)
    wait_for(lambda: (folder / "out" / "markers" / "pack.json").exists())
    assert {each.name for each in tmp_path.iterdir()} == {ODD}
