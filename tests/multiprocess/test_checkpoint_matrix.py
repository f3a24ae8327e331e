"""A checkpoint of any mesh and engine goes on under any other, with the same losses."""

import shutil
from pathlib import Path

import pytest

from tests.harness import rows_of, tapir
from tests.multiprocess.checks import largest_difference

FLAGS = [
    "--loop.batch=32",
    "--loop.log-every=1",
    "--loop.validation-samples=32",
    "--loop.save-every=5",
    "--loop.steps=10",
    "--loop.keep=9",
    "--order.block=8",
    "--optim.warmup=2",
    "--engine.precision=fp32",
    "--engine.matmul-precision=highest",
]
MESHES = {
    "reference-1": ["--engine.name=reference", "--mesh.data=1"],
    "reference-2": ["--engine.name=reference", "--mesh.data=2"],
    "reference-4": ["--engine.name=reference", "--mesh.data=4"],
    "zero-2": ["--engine.name=deepspeed_zero", "--mesh.data=2"],
    "zero-4": ["--engine.name=deepspeed_zero", "--mesh.data=4"],
}
PAIRS = [("reference-1", "zero-4"), ("zero-4", "reference-1"), ("zero-2", "reference-4")]


@pytest.fixture(scope="module")
def saved(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in sorted({source for source, _ in PAIRS}):
        found[name] = tmp_path_factory.mktemp(name)
        run = ["train", "prior", "tiny", f"--data={tokens}", f"--out={found[name]}"]
        tapir(*run, *FLAGS, *MESHES[name])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_saved_here_loads_there(
    source: str, target: str, saved: dict[str, Path], tokens: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved[source] / "checkpoints" / "step-5", tmp_path / "checkpoints" / "step-5")
    run = ["train", "prior", "tiny", f"--data={tokens}", f"--out={tmp_path}"]
    assert "resumed from" in tapir(*run, *FLAGS, *MESHES[target])
    after, expected = rows_of(tmp_path), rows_of(saved[source])[5:]
    assert [row["step"] for row in after] == [6, 7, 8, 9, 10]
    assert largest_difference(expected, after, "loss") < 1e-5
    assert largest_difference(expected, after, "grad_norm") < 1e-5
