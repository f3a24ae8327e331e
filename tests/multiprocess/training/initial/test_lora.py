"""Adapters and frozen parameters on every engine and mesh, from training to a merged model."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.parity import BOUND, CASES, ONE, Case, difference, train
from checkpoint.reader import CheckpointReader, finished_steps
from core.config import from_json
from core.storage.store import FolderStore
from models.config import LoraConfig
from planning.checkpoint_size import checkpoint_bytes
from planning.estimate.layers import count_trained
from tests.harness import rows_of, tapir
from tests.multiprocess.training.checks import largest_difference
from training.config import PriorTrain
from training.export.weights import open_model
from training.run.config import config_of

SMALL = ["--model.dim=48", "--model.heads=2", "--loop.global-batch-size=8", "--model.layers=2"]
SMALL += ["--loop.validation-samples=8", "--loop.log-every=1", "--engine.precision=fp32"]
SMALL += ["--engine.matmul-precision=highest", "--profile.peak-tflops=0.1"]
ONE_PROCESS = ["--engine.name=reference", "--mesh.data=1"]
ADAPTERS = ["--lora.rank=3", "--lora.alpha=6", "--loop.steps=4", "--optim.lr=0.02"]
ADAPTERS += ["--optim.warmup=1", "--optim.ema=0.5", "--optim.ema-every=1"]
PIPE = ["--engine.name=deepspeed_pipe", "--engine.gradient-accumulation-steps=2"]
PIPE += ["--mesh.data=1", "--mesh.tensor=2", "--mesh.pipeline=2"]
FROZEN = r"embedding|block000\.(up|q)\.|norm"


@pytest.fixture(scope="module")
def base(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished prior."""
    out = tmp_path_factory.mktemp("base") / "prior"
    _train(tokens, out, *ONE_PROCESS, "--loop.steps=3")
    return out


@pytest.fixture(scope="module")
def adapted(tokens: Path, base: Path) -> Path:
    """Adapters of it, trained by one process."""
    out = base.parent / "adapters"
    _train(tokens, out, *ONE_PROCESS, *ADAPTERS, f"--init={base}")
    return out


def _train(tokens: Path, out: Path, *flags: str, code: int = 0) -> str:
    command = ["train", "prior", "tiny", f"--data={tokens}", f"--out={out}", *SMALL]
    return tapir(*command, *flags, code=code)


def _case(name: str, **changes: Any) -> Case:
    case = next(case for case in [ONE, *CASES] if case.name.startswith(name))
    return replace(case.precise("fp32"), steps=6, **changes)


def _settings(run: Path) -> PriorTrain:
    return from_json(PriorTrain, {k: v for k, v in config_of(run).items() if k != "stage"})


@cache
def _trained(name: str, **changes: Any) -> list[dict[str, Any]]:
    return train(_case(name, **changes))


LORA, FREEZE = {"lora": LoraConfig(rank=3, alpha=9)}, {"freeze": FROZEN}


@pytest.mark.world
@pytest.mark.parametrize(
    ("name", "changes"), [("TP2xPP2xDP2 pipe", LORA), ("TP2xDP2 ZeRO-3", FREEZE)]
)
def test_a_mesh_trains_as_one_process_does(name: str, changes: dict[str, Any]) -> None:
    single, other = _trained("one", **changes), _trained(name, **changes)
    assert difference(single, other) < BOUND["fp32"]
    assert difference(_trained("one"), single, ("loss",)) > 1e-4, "all was trained"


ADAPTED = [case for case in CASES if case.mesh.pipeline < 4]
"""Of four stages of five blocks, the last one is the head alone, which has no adapters."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *(pytest.param(case, LORA, id=f"adapters {case.name}") for case in ADAPTED),
        *(pytest.param(case, FREEZE, id=f"frozen {case.name}") for case in CASES),
    ],
)
def test_every_mesh_trains_as_one_process_does(case: Case, changes: dict[str, Any]) -> None:
    single, other = _trained("one", **changes), _trained(case.name, **changes)
    assert difference(single, other) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2xPP2 pipe", "DP2 ZeRO-3"])
def test_gradient_scales_of_adapters_move_together(name: str) -> None:
    """In fp16, frozen parameters have no hooks."""
    single, other = (train(_case(each, **LORA).precise("fp16")) for each in ("one", name))
    assert difference(single, other) < 2e-3
    assert [row["scale_log2_min"] for row in single] == [row["scale_log2_min"] for row in other]


@pytest.mark.world
def test_adapters_alone_are_saved_and_take_the_planned_bytes(adapted: Path) -> None:
    settings = _settings(adapted)
    assert all(name.endswith(("lora_a", "lora_b")) for name in load_file(adapted / _FILE))
    stored = load_file(adapted / _FILE).values()
    assert 4 * sum(x.numel() for x in stored) == 4 * count_trained(settings)
    store = FolderStore(adapted / "checkpoints")
    reader = CheckpointReader(store, f"step-{finished_steps(store)[-1]}")
    rows = [row for file in reader.files for row in file["slices"]]
    assert sum(row["bytes"] for row in rows) == sum(checkpoint_bytes(settings).values())
    assert {row["name"] for row in rows} == set(load_file(adapted / _FILE))
    assert reader.facts["task"]["adapters"]["rank"] == 3


_FILE = "model.safetensors"


@pytest.mark.world
def test_a_run_in_two_parts_on_two_meshes_is_the_unbroken_one(
    adapted: Path, base: Path, tokens: Path, tmp_path: Path
) -> None:
    """One process, then tensor 2 x pipeline 2, and one process again, bit for bit."""
    command = [tokens, tmp_path / "a", *ADAPTERS, f"--init={base}"]
    _train(*command, *ONE_PROCESS, "--loop.stop-at=2")  # type: ignore[arg-type]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    unfinished = open_model(tmp_path / "b", "prior")
    assert unfinished.facts["step"] == 2 and "merged_adapters" in unfinished.facts
    _train(*command, *PIPE)  # type: ignore[arg-type]
    again = [tokens, tmp_path / "b", *ADAPTERS, f"--init={base}", *ONE_PROCESS]
    _train(*again)  # type: ignore[arg-type]
    whole = rows_of(adapted)
    assert largest_difference(whole, rows_of(tmp_path / "a"), "loss") < BOUND["fp32"]
    assert largest_difference(whole, rows_of(tmp_path / "a"), "grad_norm") < BOUND["fp32"]
    exact = load_file(adapted / _FILE), load_file(tmp_path / "b" / _FILE)
    assert exact[0].keys() == exact[1].keys()
    assert all(torch.equal(exact[0][name], exact[1][name]) for name in exact[0])


@pytest.mark.slow
def test_adapters_of_a_tied_prior(tokens: Path, tmp_path: Path) -> None:
    base, run, whole = tmp_path / "base", tmp_path / "run", tmp_path / "whole"
    _train(tokens, base, *ONE_PROCESS, "--model.tied", "--loop.steps=1")
    log = _train(tokens, run, *ADAPTERS, *ONE_PROCESS, "--model.tied", f"--init={base}")
    assert "lora_a" not in log, "a line for each adapter"
    assert open_model(run, "prior").shapes == open_model(base, "prior").shapes
    flags = [*ONE_PROCESS, "--model.tied", "--loop.steps=1", f"--init={run}"]
    _train(tokens, whole, *flags)
    event = json.loads((whole / "history.json").read_bytes())["events"][0]
    assert event["new"] == event["left"] == event["resized"] == []
    flags = [*PIPE, "--model.tied", "--loop.steps=1", f"--init={run}"]
    _train(tokens, tmp_path / "stages", *flags)
    one, stages = (rows_of(tmp_path / each, "train") for each in ("whole", "stages"))
    assert largest_difference(one, stages, "loss") < 1e-5


@pytest.mark.slow
def test_other_bases_are_refused(base: Path, adapted: Path, tokens: Path, tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(base, other)
    flags = [*ADAPTERS, *ONE_PROCESS]
    _train(tokens, run, *flags, f"--init={other}", "--loop.stop-at=1")
    moved = f"--resume-with=init={base}"
    _train(tokens, run, *flags, f"--init={other}", moved, "--loop.stop-at=2")
    moved = f"--resume-with=init={adapted}"
    text = _train(tokens, run, *flags, f"--init={adapted}", moved, code=2)
    assert "holds adapters of the prior that was at" in text
    assert "put it back" in text and "or give its place by --resume-with init=PLACE" in text
    text = _train(tokens, tmp_path / "c", *flags, f"--init={base}", "--model.layers=3", code=2)
    assert "is not a base for adapters" in text and "block002" in text
    text = _train(tokens, tmp_path / "h", *flags, f"--init={base}", "--model.heads=4", code=2)
    assert "model.heads is 2 there and 4 here" in text and "give --model.heads 2" in text
    text = _train(tokens, tmp_path / "d", *flags, code=2)
    assert "give its run as --init" in text


@pytest.mark.world
def test_adapters_go_on_with_the_checkpoint_they_started_from(
    base: Path, tokens: Path, tmp_path: Path
) -> None:
    """The same command, while their base trains on."""
    growing, run = shutil.copytree(base, tmp_path / "growing"), tmp_path / "run"
    (growing / "model.json").unlink()
    command = [*ADAPTERS, *ONE_PROCESS, f"--init={growing}"]
    _train(tokens, run, *command, "--loop.stop-at=2")
    _train(tokens, growing, *ONE_PROCESS, "--loop.steps=3", "--resume-with=loop.steps=4")
    _train(tokens, run, *command)
    noted = json.loads((run / "model.json").read_text())["facts"]["adapters"]["base"]
    assert noted["place"] == str(growing / "checkpoints" / "step-3")
    (growing / "checkpoints" / "step-3" / "manifest.json").unlink()
    text = _train(tokens, run, *command, "--resume-with=loop.steps=5", code=2)
    assert "which is not there" in text and f"{growing} holds another one now" in text


@pytest.mark.world
def test_adapters_are_exported_as_one_model(adapted: Path, tmp_path: Path) -> None:
    whole = open_model(adapted, "prior")
    assert "merged_adapters" in whole.facts
    out = tmp_path / "export"
    tapir("export", str(adapted), str(out))
    tapir("import", str(out), str(tmp_path / "back"))
    assert open_model(tmp_path / "back" / "prior", "prior").digest == whole.digest


@pytest.mark.slow
def test_frozen_weights_stay_and_are_saved(base: Path, tokens: Path, tmp_path: Path) -> None:
    """The checkpoint has no moments of them, and is read by another mesh."""
    flags = [f"--init={base}", f"--freeze={FROZEN}", "--loop.steps=4", "--optim.ema=0.5"]
    flags += ["--optim.ema-every=1"]
    _train(tokens, tmp_path, *flags, *PIPE, "--loop.stop-at=2")
    store = FolderStore(tmp_path / "checkpoints")
    reader = CheckpointReader(store, "step-2")
    rows = [row for file in reader.files for row in file["slices"]]
    assert sum(row["bytes"] for row in rows) == sum(checkpoint_bytes(_settings(tmp_path)).values())
    assert reader.kinds("block000.q.weight") == ["master"]
    _train(tokens, tmp_path, *flags, *ONE_PROCESS)
    before, after = load_file(base / _FILE), load_file(tmp_path / _FILE)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if re.search(FROZEN, name)}
    thawed = "--resume-with=freeze=,loop.steps=5"
    text = _train(tokens, tmp_path, *flags, *ONE_PROCESS, thawed, code=2)
    assert "that its run froze (block000." in text and f"give freeze={FROZEN!r}" in text
