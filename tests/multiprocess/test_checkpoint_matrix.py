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
    "--checkpoint.every=5",
    "--loop.steps=10",
    "--checkpoint.keep=9",
    "--order.block=8",
    "--optim.warmup=2",
    "--model.heads=6",
    "--engine.precision=fp32",
    "--engine.matmul-precision=highest",
]
ZERO, PIPE = "--engine.name=deepspeed_zero", "--engine.name=deepspeed_pipe"
MESHES = {
    "reference-1": ["--engine.name=reference", "--mesh.data=1"],
    "reference-2": ["--engine.name=reference", "--mesh.data=2"],
    "zero1-4": [ZERO, "--mesh.data=4"],
    "zero3-2": [ZERO, "--mesh.data=2", "--engine.zero-stage=3"],
    "zero2-tp2": [ZERO, "--mesh.data=2", "--mesh.tensor=2", "--engine.zero-stage=2"],
    "tp2-pp2": [PIPE, "--mesh.data=1", "--mesh.tensor=2", "--mesh.pipeline=2"],
    "pp3": [PIPE, "--mesh.data=1", "--mesh.pipeline=3"],
    "tp4": [PIPE, "--mesh.data=1", "--mesh.tensor=4"],
    "paper": [ZERO, "--mesh.data=4", "--mesh.machines=2", "--engine.zero-stage=3"],
}
"""TP 4 pads the 6 heads to 8."""
PAIRS = [
    ("reference-1", "tp2-pp2"),
    ("reference-1", "pp3"),
    ("tp2-pp2", "zero3-2"),
    ("zero3-2", "tp4"),
    ("paper", "zero2-tp2"),
    ("zero1-4", "reference-2"),
]


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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp2-pp2", "paper"])
def test_a_compressed_run_resumes_bit_equal(mesh: str, tokens: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, *MESHES[mesh], "--compress.rank=40", "--compress.warm-start"]
    flags += ["--mesh.data=2"] if mesh == "tp2-pp2" else []
    run = ["train", "prior", "tiny", f"--data={tokens}"]
    tapir(*run, *flags, f"--out={tmp_path / 'whole'}")
    source = tmp_path / "whole" / "checkpoints" / "step-5"
    shutil.copytree(source, tmp_path / "again" / "checkpoints" / "step-5")
    tapir(*run, *flags, f"--out={tmp_path / 'again'}")
    expected, after = rows_of(tmp_path / "whole")[5:], rows_of(tmp_path / "again")
    for field in ("step", "loss", "grad_norm"):
        assert [row[field] for row in after] == [row[field] for row in expected]
