"""Every preset reaches validation, save and end; the paper's ones as stages of examples/paper.py.

What is cut down: the networks by --model flags, steps, the intervals of validations and saves, the
mesh. Batch, lanes, validation samples, precision, compression and average are the preset's.
"""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.chain import Resources
from core.config import to_json
from core.files.atomic import write_atomic
from data_pipeline.formats.shards import build_tar
from data_pipeline.images.crops import encode_png
from data_pipeline.sources.drawn.shapes import draw_scene, render
from tests.harness import ROOT, rows_of, tapir
from training.presets import PRESETS
from workflow.chain.stages import chain_of
from workflow.run_file import RunFile, StageSpec, Value

pytestmark = pytest.mark.slow
PAIRS, SMALL, PIXELS = 2300, 60, 16
"""The smaller ones of them would be 2.6% of rejects, and the token job allows 1%."""
SHORT: dict[str, Value] = {"loop.steps": 2, "loop.validate_every": 1, "checkpoint.every": 1}
DVAE: dict[str, Value] = {
    "model.pixels": PIXELS,
    "model.width": 4,
    "model.codebook": 16,
    "model.code_width": 8,
}
PRIOR: dict[str, Value] = {
    "model.dim": 16,
    "model.heads": 2,
    "model.layers": 2,
    "model.text_length": 8,
}
CLIP: dict[str, Value] = {"model.pixels": PIXELS, "model.dim": 16, "model.layers": 1}
ALONE: dict[str, Value] = {"mesh.data": 1}
TWO: dict[str, Value] = {"mesh.data": 2, "mesh.tensor": 1, "mesh.pipeline": 1}
CUT: dict[str, dict[str, Value]] = {
    "pack": {"validation": 0.5, "min_side": PIXELS, "block": 1},
    "dvae": {**DVAE, **SHORT, **TWO},
    "tokenize": {"block": 1},
    "prior": {**PRIOR, **SHORT, **TWO},
}
"""Of the paper's stages. A block is one pair, so that 1,024 lanes need 1,024 pairs alone."""
PAPERS = [name for name in PRESETS["prior"] if name.startswith("paper")]
KEPT = {
    "loop": ("global_batch_size", "validation_samples"),
    "order": ("lanes", "shuffle_buffer"),
    "engine": ("precision", "gradient_accumulation_steps", "recompute", "name", "zero_stage"),
    "compress": ("rank", "warm_start", "error_feedback", "payload"),
    "optim": ("ema", "ema_every", "halvings", "max_variance", "moments"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of pictures with captions, some of them smaller than the dVAE's, and what follows."""
    folder = tmp_path_factory.mktemp("paper")
    samples = []
    for i in range(PAIRS):
        scene = draw_scene(0, i)
        side = PIXELS // 2 if i < SMALL else PIXELS
        picture = encode_png(render(scene, max(side, 16), 0, i)[:side, :side])
        key, caption = f"{i:05d}", scene.caption.encode()
        samples.append({"__key__": key, "png": picture, "txt": caption})
    write_atomic(folder / "pairs" / "pairs.tar", build_tar(samples))
    return folder


def paper_run(folder: Path, preset: str) -> RunFile:
    """examples/paper.py on this machine, with another preset of the prior."""
    stages = {}
    for name, body in runpy.run_path(str(ROOT / "examples" / "paper.py"))["run"]["stages"].items():
        flags = {**body.get("flags", {}), **CUT.get(name, {})}
        kind = preset if name == "prior" else body.get("preset", "tiny")
        stages[name] = StageSpec(preset=kind, flags=flags, resources=Resources())
    stages["pack"] = replace(stages["pack"], source=str(folder / "pairs"))
    return RunFile(name="paper", out=folder / "out", stages=stages)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Path:
    """The data of the paper's prior, made by the example's own commands."""
    chain = chain_of(paper_run(folder, PAPERS[0]), "local")
    for job in chain.jobs[:-1]:
        tapir(*job.command)
    assert_the_end_was_reached(folder / "out" / "dvae", "dvae", "paper_dvae")
    return folder / "out" / "data" / "tokens"


def assert_the_end_was_reached(run: Path, stage: str, preset: str) -> None:
    """Two validations, two saves and a finished model, by the preset's own settings."""
    assert [row["step"] for row in rows_of(run)] == [2]
    assert [row["step"] for row in rows_of(run, "validation")] == [1, 2]
    assert (run / "model.json").is_file() and (run / "model.safetensors").is_file()
    saved = sorted(path.parent.name for path in run.glob("checkpoints/*/manifest.json"))
    assert saved == ["step-1", "step-2"]
    config = json.loads((run / "config.json").read_text())
    own: Any = to_json(PRESETS[stage][preset]())
    for part, names in KEPT.items():
        for name in names:
            expected, actual = own[part][name], config[part][name]
            resolved = expected == "auto" and actual in ("fp32", "bf16")
            assert resolved or actual == expected, (part, name)


@pytest.mark.parametrize("preset", PAPERS)
def test_the_papers_stages_reach_their_ends(preset: str, folder: Path, tokens: Path) -> None:
    """With the preset's lanes and batch of 1,024, compression, bf16, average and BPE dropout."""
    run = paper_run(folder, preset)
    prior = run.stages["prior"]
    out = f"--out={folder / preset}"
    (job,) = (job for job in chain_of(run, "local").jobs if job.name == "prior")
    command = [out if part.startswith("--out=") else part for part in job.command]
    assert command[2] == preset and f"--data={tokens}" in command and prior.flags
    tapir(*command)
    assert_the_end_was_reached(folder / preset, "prior", preset)
    path = folder / preset / "checkpoints" / "step-2" / "manifest.json"
    slices = [row for file in json.loads(path.read_text())["files"] for row in file["slices"]]
    assert {"master", "ema", "error"} <= {row["kind"].partition("@")[0] for row in slices}


@pytest.mark.parametrize(
    ("stage", "preset", "cut"),
    [
        ("dvae", "tiny", {**DVAE, **ALONE}),
        ("dvae", "small", {**DVAE, **ALONE}),
        ("prior", "tiny", {**PRIOR, **TWO}),
        ("prior", "small", {**PRIOR, **ALONE}),
        ("clip", "tiny", {**CLIP, **ALONE}),
    ],
)
def test_small_presets_reach_their_ends(
    stage: str, preset: str, cut: dict[str, Value], folder: Path, tokens: Path
) -> None:
    out = folder / f"{stage}-{preset}"
    data = tokens if stage == "prior" else folder / "out" / "data" / "raw"
    bpe = [] if stage == "dvae" else [f"--bpe={folder / 'out' / 'bpe'}"]
    flags = [f"--{name}={value}" for name, value in {**cut, **SHORT}.items()]
    tapir("train", stage, preset, f"--data={data}", f"--out={out}", *bpe, *flags)
    assert_the_end_was_reached(out, stage, preset)


def test_no_preset_is_left_out() -> None:
    tried = {("bpe", "paper_bpe"), ("bpe", "tiny"), ("dvae", "paper_dvae")}
    tried |= {("prior", name) for name in PAPERS}
    tried |= {("dvae", "tiny"), ("dvae", "small"), ("prior", "tiny"), ("prior", "small")}
    assert tried | {("clip", "tiny")} == {(s, name) for s, rows in PRESETS.items() for name in rows}
