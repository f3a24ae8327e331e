"""A dVAE with VQ, a perceptual loss and a discriminator: every mesh, and a resumed run."""

from pathlib import Path
from typing import Any

import pytest

from checkpoint.reader import open_checkpoint
from tests.harness import rows_of, tapir
from tests.multiprocess.training.checks import largest_difference
from tests.perceptual_weights import write_weights
from training.export.weights import load_dvae, open_model

STEPS, HALF = 4, 2
FLAGS = [
    *("--model.pixels=16", "--model.groups=2", "--model.width=8", "--model.quantizer=vq"),
    *("--model.codebook=32", "--perceptual.weight=1", "--discriminator.weight=0.5"),
    *("--discriminator.start=0.25", "--discriminator.layers=2", "--discriminator.width=8"),
    *(f"--loop.steps={STEPS}", "--loop.global-batch-size=16", "--loop.log-every=1"),
    *("--loop.validation-samples=32", "--loop.seed=2", "--checkpoint.every=2"),
    *("--optim.warmup=2", "--optim.eps=0.01", "--optim.ema=0.9"),
    *("--engine.precision=fp32", "--engine.matmul-precision=highest"),
]
MESHES = {
    "1 process": ["--mesh.data=1"],
    "DP2": ["--mesh.data=2"],
    "ZeRO-1": ["--mesh.data=2", "--engine.name=deepspeed_zero", "--engine.zero-stage=1"],
    "ZeRO-3": ["--mesh.data=2", "--engine.name=deepspeed_zero", "--engine.zero-stage=3"],
}
FIGURES = (*("loss", "log_likelihood", "commitment", "perceptual", "discriminator", "grad_norm"),)


def assert_equal(single: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Relative differences; that of a mean score, which may be near zero, to the hinge's margin."""
    for figure in FIGURES:
        assert largest_difference(single, other, figure) < 1e-5, figure
    scores = zip(single, other, strict=True)
    assert max(abs(a["adversarial"] - b["adversarial"]) for a, b in scores) < 1e-5


@pytest.fixture(scope="module")
def command(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    vgg, linear = write_weights(tmp_path_factory.mktemp("vgg"))
    weights = [f"--perceptual.vgg={vgg}", f"--perceptual.linear={linear}"]
    return ["train", "dvae", "tiny", f"--data={raw}", *FLAGS, *weights]


@pytest.fixture(scope="module")
def unbroken(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    tapir(*command, *MESHES["1 process"], f"--out={out}")
    return out


@pytest.mark.world
@pytest.mark.parametrize("mesh", ["DP2", pytest.param("ZeRO-3", marks=pytest.mark.slow)])
def test_losses_equal_one_process(
    mesh: str, command: list[str], unbroken: Path, tmp_path: Path
) -> None:
    tapir(*command, *MESHES[mesh], f"--out={tmp_path}")
    single, other = rows_of(unbroken), rows_of(tmp_path)
    assert len(single) == len(other) == STEPS
    assert_equal(single, other)


@pytest.mark.world
@pytest.mark.parametrize("mesh", ["1 process", pytest.param("ZeRO-1", marks=pytest.mark.slow)])
def test_a_discriminator_is_resumed_with_its_moments(
    mesh: str, command: list[str], unbroken: Path, tmp_path: Path
) -> None:
    """Half of the steps on one process, which finishes the run bit for bit; the rest on a mesh."""
    out = f"--out={tmp_path}"
    tapir(*command, *MESHES["1 process"], out, f"--loop.stop-at={HALF}")
    reader = open_checkpoint(f"{tmp_path}/checkpoints/step-{HALF}")
    rival = [name for name in reader.shapes() if name.startswith("dvae.discriminator.")]
    assert len(rival) == 8 and all("exp_avg_sq" in reader.kinds(name) for name in rival)
    tapir(*command, *MESHES[mesh], out)
    whole, both = rows_of(unbroken), rows_of(tmp_path)
    assert_equal(whole, both)
    if mesh == "1 process":
        for figure in (*FIGURES, "adversarial"):
            assert [row[figure] for row in whole] == [row[figure] for row in both]
    names = open_model(tmp_path, "dvae").shapes
    assert "dvae.dvae.quantizer.codebook.weight" in names
    assert not any("discriminator" in name for name in names), "only the network is a model"
    finished, checkpoint = (load_dvae(tmp_path, step)[0].state_dict() for step in (None, STEPS))
    assert all(finished[name].equal(value) for name, value in checkpoint.items())
