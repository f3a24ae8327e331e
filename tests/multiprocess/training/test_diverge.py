"""`tapir diverge` finds the first tensor in which two runs differ, and nothing in equal ones."""

import json
from pathlib import Path

import pytest

from core.files.atomic import seal
from tests.harness import tapir

FLAGS = [
    "--loop.global-batch-size=32",
    "--loop.validation-samples=32",
    "--checkpoint.every=2",
    "--loop.steps=3",
    "--checkpoint.keep=9",
    "--engine.matmul-precision=highest",
]
RUNS = {
    "one": ["--engine.name=reference", "--mesh.data=1", "--engine.precision=fp32"],
    "pipe": [
        "--engine.name=deepspeed_pipe",
        "--mesh.tensor=2",
        "--mesh.pipeline=2",
        "--mesh.data=2",
        "--engine.gradient-accumulation-steps=2",
        "--engine.precision=fp32",
    ],
    "zero3": ["--mesh.data=2", "--engine.zero-stage=3", "--engine.precision=fp32"],
    "bf16": ["--engine.name=reference", "--mesh.data=2", "--engine.precision=bf16"],
    "lr": [
        "--engine.name=reference",
        "--mesh.data=1",
        "--engine.precision=fp32",
        "--optim.lr=1e-3",
    ],
}


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, flags in RUNS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        run = ["train", "prior", "tiny", f"--data={tokens}", f"--out={folders[name]}"]
        tapir(*run, *FLAGS, *flags)
    return folders


def _differences(runs: dict[str, Path], a: str, b: str) -> list[dict[str, object]]:
    start = f"--checkpoint={runs['one'] / 'checkpoints' / 'step-2'}"
    exact = "--tolerance=1e-5"
    last = tapir("diverge", str(runs[a]), str(runs[b]), start, exact, "--json").splitlines()
    rows: list[dict[str, object]] = next(
        json.loads(line)["differences"] for line in last if line.startswith("{")
    )
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pipe", "zero3"])
def test_equal_runs_do_not_differ(mesh: str, runs: dict[str, Path]) -> None:
    assert _differences(runs, "one", mesh) == []


@pytest.mark.slow
def test_another_precision_differs_first_in_the_first_matmul(runs: dict[str, Path]) -> None:
    first = _differences(runs, "one", "bf16")[0]
    assert (first["direction"], first["layer"], first["rank"]) == ("forward", "block000", 0)
    assert 1e-4 < float(str(first["relative"])) < 1e-1


@pytest.mark.slow
def test_another_learning_rate_differs_in_the_update_alone(runs: dict[str, Path]) -> None:
    rows = _differences(runs, "one", "lr")
    assert {row["direction"] for row in rows} == {"update"}
    assert all(str(row["tensor"]).startswith("weight of") for row in rows)


@pytest.mark.world
def test_a_folder_without_a_run_or_capsule_is_refused(tmp_path: Path) -> None:
    assert "is not a run folder" in tapir("diverge", str(tmp_path), str(tmp_path), code=2)
    wrong = tapir("diverge", str(tmp_path), str(tmp_path), "--tolerance=-1", code=2)
    assert "must not be negative" in wrong
    (tmp_path / "c.json").write_bytes(seal({"step": 3}))
    for path, text in (
        (tmp_path / "c.json", "is not a capsule;"),
        (Path(__file__), "is not a capsule,"),
    ):
        assert text in tapir("replay", str(path), code=2)
    assert "there is no capsule" in tapir("replay", str(tmp_path / "none"), code=2)
