"""A checkpoint of any mesh and engine goes on under any other, with the same losses.

TAPIR_MATRIX=all (`make matrix`) takes every pair; `make test-slow` a chosen diagonal.
"""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from checkpoint.reader import open_checkpoint
from parallel.config import CompressConfig, EngineConfig, MeshConfig
from parallel.pipelines.schedules import Schedule
from tests.faults.plants import changed, train_with
from tests.harness import rows_of
from tests.multiprocess.training.checks import largest_difference
from training.config import PriorTrain
from training.export.weights import load_prior, open_model
from training.presets import prior_tiny

BOUND = 1e-5
STEPS, SAVED = 10, 5


def _zero(stage: int, **mesh: int) -> tuple[MeshConfig, EngineConfig]:
    return MeshConfig(**mesh), EngineConfig(name="deepspeed_zero", zero_stage=stage)


def _pipe(**mesh: int) -> tuple[MeshConfig, EngineConfig]:
    return MeshConfig(**mesh), EngineConfig(name="deepspeed_pipe", gradient_accumulation_steps=2)


def _torch(
    schedule: Schedule = "1f1b", chunks: int = 1, **mesh: int
) -> tuple[MeshConfig, EngineConfig]:
    return MeshConfig(**mesh), EngineConfig(
        name="torch", gradient_accumulation_steps=2, schedule=schedule, virtual_stages=chunks
    )


LAYOUTS = {
    "1 process": (MeshConfig(), EngineConfig()),
    "TP2": _pipe(tensor=2),
    "PP2": _pipe(pipeline=2),
    "DP4": _zero(1, data=4),
    "DP4 pipe": _pipe(data=4),
    "TP2xPP2": _pipe(tensor=2, pipeline=2),
    "TP2xPP2xDP2": _pipe(tensor=2, pipeline=2, data=2),
    "TP4 padded": _pipe(tensor=4),
    "TP2xDP2 ZeRO-2": _zero(2, tensor=2, data=2),
    "paper 2x2": _zero(3, data=4, nodes=2),
    "torch TP2xDP2": _torch(tensor=2, data=2),
    "torch 2x2": _torch(data=4, nodes=2),
    "torch PP2xDP2": _torch("interleaved", 2, pipeline=2, data=2),
    "torch TP2xPP2": _torch("zero-bubble", tensor=2, pipeline=2),
}
REPLICAS = {
    "4": _zero(1, data=4),
    "2": _zero(2, data=2),
    "8": _zero(1, data=8),
}
"""Layouts whose shards of a matrix, and so their Q, are the same."""
"""TP4 pads the 6 heads to 8."""
ALL = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]
SOME = [
    ("1 process", "TP2xPP2"),
    ("TP2xPP2", "paper 2x2"),
    ("paper 2x2", "TP2xPP2xDP2"),
    ("TP2xPP2xDP2", "TP4 padded"),
    ("TP4 padded", "DP4"),
    ("DP4", "TP2xDP2 ZeRO-2"),
    ("TP2xDP2 ZeRO-2", "1 process"),
    ("1 process", "torch 2x2"),
    ("torch 2x2", "TP2xPP2xDP2"),
    ("TP2xPP2", "torch TP2xDP2"),
    ("torch TP2xDP2", "paper 2x2"),
    ("paper 2x2", "torch 2x2"),
    ("torch 2x2", "torch TP2xDP2"),
    ("torch TP2xDP2", "1 process"),
    ("torch PP2xDP2", "TP2xPP2"),
    ("torch 2x2", "torch PP2xDP2"),
    ("1 process", "torch TP2xPP2"),
]
PAIRS = ALL if os.environ.get("TAPIR_MATRIX") == "all" else SOME


def _settings(tokens: Path, out: Path, layout: str, **parts: dict[str, Any]) -> PriorTrain:
    mesh, engine = (LAYOUTS | REPLICAS)[layout]
    engine = replace(engine, precision="fp32", matmul_precision="highest")
    settings = replace(prior_tiny(), data=str(tokens), out=out, mesh=mesh, engine=engine)
    small: dict[str, dict[str, Any]] = {
        "model": {"dim": 48, "heads": 6},
        "loop": {
            "steps": STEPS,
            "global_batch_size": 32,
            "log_every": 1,
            "validate_every": 0,
            "validation_samples": 32,
        },
        "optim": {"warmup": 2, "ema": 0.9, "ema_every": 2},
        "checkpoint": {"every": SAVED, "keep": 9},
    }
    return changed(settings, **{**small, **parts})


@pytest.fixture(scope="module")
def saved(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in sorted({source for source, _ in PAIRS}):
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        train_with("nothing", _settings(tokens, folders[name], name))
    return folders


def _from_half(source: Path, target: Path) -> None:
    name = f"checkpoints/step-{SAVED}"
    shutil.copytree(source / name, target / name)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_saved_here_loads_there(
    source: str, target: str, saved: dict[str, Path], tokens: Path, tmp_path: Path
) -> None:
    _from_half(saved[source], tmp_path)
    train_with("nothing", _settings(tokens, tmp_path, target))
    after, expected = rows_of(tmp_path), rows_of(saved[source])[SAVED:]
    assert [row["step"] for row in after] == list(range(SAVED + 1, STEPS + 1))
    assert largest_difference(expected, after, "loss") < BOUND
    assert largest_difference(expected, after, "grad_norm") < BOUND
    last = f"checkpoints/step-{STEPS}"
    one, two = (open_checkpoint(str(path / last)) for path in (saved[source], tmp_path))
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        pairs = [(one.tensor(name, kind), two.tensor(name, kind)) for name in one.shapes()]
        apart = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
        whole = math.sqrt(sum(float(a.double().square().sum()) for a, _ in pairs))
        assert apart / whole < BOUND, kind


@pytest.mark.slow
def test_one_process_opens_a_checkpoint_of_any_mesh(saved: dict[str, Path], tmp_path: Path) -> None:
    """An unfinished run's checkpoint loads as the model that `tapir train` writes at that step."""
    for name, run in saved.items():
        unfinished = tmp_path / name
        ended = shutil.ignore_patterns("model.*")
        shutil.copytree(run, unfinished, ignore=ended)
        (mine, config, facts), expected = load_prior(unfinished), load_prior(run)
        pairs = zip(mine.parameters(), expected[0].parameters(), strict=True)
        assert all(a.equal(b) for a, b in pairs), name
        assert (config, facts["step"]) == (expected[1], STEPS)
        assert facts.items() <= expected[2].items() and {"dvae", "tokenizer"} <= facts.keys()
        assert open_model(unfinished, "prior").digest == open_model(run, "prior").digest
        half = load_prior(run, SAVED)
        assert half[2]["step"] == SAVED
        assert not all(
            a.equal(b) for a, b in zip(half[0].parameters(), mine.parameters(), strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2xPP2xDP2", "paper 2x2", "torch 2x2"])
def test_a_compressed_run_resumes_bit_equal(layout: str, tokens: Path, tmp_path: Path) -> None:
    compress = CompressConfig(rank=12, warm_start=True)
    runs = [
        replace(_settings(tokens, tmp_path / name, layout), compress=compress)
        for name in ("whole", "again")
    ]
    train_with("nothing", runs[0])
    _from_half(runs[0].out, runs[1].out)
    train_with("nothing", runs[1])
    expected, after = rows_of(runs[0].out)[SAVED:], rows_of(runs[1].out)
    for field in ("step", "loss", "grad_norm", "compress_sent_bytes"):
        assert [row[field] for row in after] == [row[field] for row in expected]
    models = [(run.out / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1]


@pytest.fixture(scope="module")
def averaged(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 4 replicas that saves the mean of their error buffers, and goes on with it."""
    out = tmp_path_factory.mktemp("averaged")
    train_with("errors", _averaging(tokens, out, "4"), at=SAVED + 1, factor=1)
    return out


def _averaging(tokens: Path, out: Path, layout: str) -> PriorTrain:
    saves = {"every": SAVED, "keep": 9, "errors": "mean"}
    return replace(
        _settings(tokens, out, layout, checkpoint=saves), compress=CompressConfig(rank=2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", REPLICAS)
def test_the_mean_of_the_error_buffers_is_owed_on_any_number_of_replicas(
    layout: str, averaged: Path, tokens: Path, tmp_path: Path
) -> None:
    """Equal to the run whose buffers were replaced by their mean in memory at that step."""
    _from_half(averaged, tmp_path)
    train_with("nothing", _averaging(tokens, tmp_path, layout))
    after, expected = rows_of(tmp_path), rows_of(averaged)[SAVED:]
    assert len(after) == STEPS - SAVED
    for field in ("loss", "grad_norm"):
        assert largest_difference(expected, after, field) < BOUND, field


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["4", "2"])
def test_without_its_error_buffers_a_run_is_another(
    layout: str, averaged: Path, tokens: Path, tmp_path: Path
) -> None:
    _from_half(averaged, tmp_path)
    train_with("errors", _averaging(tokens, tmp_path, layout), at=SAVED + 1, factor=0)
    after, expected = rows_of(tmp_path), rows_of(averaged)[SAVED:]
    worst = {name: largest_difference(expected, after, name) for name in ("loss", "grad_norm")}
    assert worst["grad_norm"] > 100 * BOUND and worst["loss"] > 10 * BOUND, worst


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2xPP2xDP2", "8"])
def test_eight_ranks_write_the_model_together(layout: str, tokens: Path, tmp_path: Path) -> None:
    """Eight files that safetensors loads, none above 1.5 times the mean, whatever the mesh."""
    short = {"steps": 2, "global_batch_size": 16, "validate_every": 0, "validation_samples": 32}
    parts = {"model": {"dim": 96, "heads": 6}, "loop": short}
    settings = _settings(tokens, tmp_path, layout, checkpoint={"shard_gigabytes": 0.0}, **parts)
    train_with("nothing", settings)
    paths = sorted(tmp_path.glob("model-*.safetensors"))
    sizes = [path.stat().st_size for path in paths]
    assert len(paths) == 8 and max(sizes) <= 1.5 * sum(sizes) / 8
    tensors = {name: value for path in paths for name, value in load_file(path).items()}
    last = open_checkpoint(str(tmp_path / "checkpoints/step-2"))
    assert tensors.keys() == last.shapes().keys() and not (tmp_path / "model.safetensors").exists()
    assert all(value.equal(last.tensor(name, "ema")) for name, value in tensors.items())
    model = open_model(tmp_path, "prior")
    assert all(model.read(name).equal(value) for name, value in tensors.items())
    assert load_prior(tmp_path)[2]["step"] == 2
    written = [path.stat().st_mtime_ns for path in paths]
    train_with("nothing", settings)  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in paths] == written


@pytest.mark.slow
def test_saving_in_the_background_changes_nothing(tokens: Path, tmp_path: Path) -> None:
    """Saves at every step, in background and foreground, against one save at the end."""
    modes = [{"every": 1}, {"every": 1, "async_save": False}, {"every": 10**6}]
    results = []
    for i, checkpoint in enumerate(modes):
        settings = _settings(tokens, tmp_path / str(i), "TP2xDP2 ZeRO-2", checkpoint=checkpoint)
        train_with("nothing", settings)
        rows = [(row["loss"], row["grad_norm"]) for row in rows_of(settings.out)]
        results.append((rows, (settings.out / "model.safetensors").read_bytes()))
    assert results[0] == results[1] == results[2]
