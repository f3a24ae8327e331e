"""The bytes of a checkpoint, by part, that a plan names equal those that live ranks write."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.parity import BOUND, SEED
from checkpoint.config import CheckpointConfig, ErrorBuffers
from checkpoint.reader import open_checkpoint
from checkpoint.writer import write_checkpoint
from cluster.launcher import launch
from core.config import from_json, to_json
from core.heartbeat import Heart
from core.storage.store import FolderStore
from models.config import PriorConfig
from models.prior import prior_program
from parallel.config import CompressConfig, EngineConfig, MeshConfig, OptimConfig
from parallel.engines.protocol import Engine, EngineSettings
from parallel.engines.registry import build_engine, modules_of
from parallel.ledger import Ledger, recorded
from parallel.mesh import Mesh, build_mesh, own_mesh
from parallel.world import join_world, leave_world
from planning.checkpoint_size import PARTS, checkpoint_bytes
from planning.config import settings_of
from tests.multiprocess.test_plan_reality import MODERN, SMALL, WIDE
from training.config import LoopConfig, PriorTrain
from training.ema import Average

BATCH = 8
AVERAGED = OptimConfig(ema=0.9)


def _case(
    mesh: MeshConfig,
    engine: str,
    errors: ErrorBuffers = "auto",
    model: PriorConfig = SMALL,
    optim: OptimConfig = AVERAGED,
    **compress: Any,
) -> PriorTrain:
    name, _, rest = engine.partition(" ")
    stage, _, precision = rest.partition(" ")
    return PriorTrain(
        model=model,
        loop=LoopConfig(global_batch_size=BATCH),
        mesh=mesh,
        engine=EngineConfig(
            name=name,  # type: ignore[arg-type]
            zero_stage=int(stage or 1),
            gradient_accumulation_steps=2,
            precision=precision or "fp32",  # type: ignore[arg-type]
        ),
        optim=optim,
        compress=CompressConfig(**compress),
        checkpoint=CheckpointConfig(errors=errors),
    )


CASES = {
    "DP4, mean": _case(MeshConfig(data=4), "deepspeed_zero 1", "mean", rank=4),
    "plain, compressed, own": _case(MeshConfig(data=2), "reference", rank=8, warm_start=True),
    "ZeRO-2, bf16 moments": _case(
        MeshConfig(data=2), "deepspeed_zero 2", optim=OptimConfig(moments="bf16", beta2=0.95)
    ),
    "TP4, padded heads": _case(MeshConfig(tensor=4), "deepspeed_pipe"),
    "PP2 x DP2, fp16, own": _case(
        MeshConfig(pipeline=2, data=2), "deepspeed_pipe 1 fp16", rank=8, warm_start=True
    ),
    "PP2 x DP2, tied": _case(  # starts from a checkpoint of one process
        MeshConfig(pipeline=2, data=2), "deepspeed_pipe", model=replace(SMALL, **MODERN)
    ),
    "TP2 x DP2, mean": _case(
        MeshConfig(tensor=2, data=2), "deepspeed_zero 1", "mean", rank=8, warm_start=True
    ),
    "paper, mean": _case(
        MeshConfig(data=4, nodes=2), "deepspeed_zero 3", "mean", WIDE, rank=16, warm_start=True
    ),
}
"""DP4 comes first: DeepSpeed keeps the groups of an earlier mesh with tensor ranks."""
TIED = "PP2 x DP2, tied"
ALONE = replace(CASES[TIED], mesh=MeshConfig(), engine=EngineConfig(gradient_accumulation_steps=2))
"""The same run on one process."""
OTHER_SEED = SEED + 1
"""Of the weights that the tied cases start from."""


def write_ranks(payload: str) -> None:
    """Do a step of every case on this rank, and write its checkpoint."""
    body = json.loads(payload)
    world = join_world()
    with recorded(Mesh(world=world)) as ledger:  # DeepSpeed keeps references to the first functions
        for number, row in enumerate(body["cases"]):
            settings = from_json(PriorTrain, row)
            mesh = build_mesh(settings.mesh, world)
            Ledger.__init__(ledger, mesh, Heart(world.rank))
            start = body["start"] if settings.model.tied else ""
            _write(settings, mesh, Path(body["out"], str(number)), start)
    leave_world(world)


def _engine(settings: PriorTrain, mesh: Mesh, start: str, seed: int = SEED) -> Engine:
    """An engine; with the state of a checkpoint, if `start` is given."""
    chosen = EngineSettings(
        optim=settings.optim,
        engine=settings.engine,
        compress=settings.compress,
        seed=SEED,
        errors=settings.checkpoint.errors,
    )
    engine: Engine = build_engine(prior_program(settings.model, seed, mesh.shared), chosen, mesh)
    if start:
        engine.load_slices(open_checkpoint(start))
    return engine


def _write(settings: PriorTrain, mesh: Mesh, out: Path, start: str = "", seed: int = SEED) -> None:
    engine = _engine(settings, mesh, start, seed)
    average = Average(engine, settings.optim, mesh.world.device)
    config, each = settings.model, BATCH // mesh.data.size // 2
    text = torch.zeros(each, config.text_length, dtype=torch.int64)
    image = torch.zeros(each, config.image_length, dtype=torch.int64)
    engine.step([{"text": text, "image": image}] * 2, 1e-4)
    slices = [*engine.error_slices(), *engine.state_slices(), *average.slices()]
    store, world = FolderStore(out), mesh.world
    write_checkpoint(store, "step-1", slices, {}, world.rank, world.gather_text)
    engine.close()


START = "start"
"""A checkpoint that one process wrote, of other weights than SEED's."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> its checkpoint; one world for all cases of a size."""
    start = tmp_path_factory.mktemp("start")
    _write(ALONE, own_mesh(), start, seed=OTHER_SEED)
    folders = {START: start / "step-1"}
    for ranks in (2, 4):
        out = tmp_path_factory.mktemp(f"world{ranks}")
        cases = {name: case for name, case in CASES.items() if case.mesh.world == ranks}
        rows = [to_json(case) for case in cases.values()]
        payload = {"out": str(out), "cases": rows, "start": str(folders[START])}
        modules = {m for case in cases.values() for m in modules_of(case.engine.name, True)}
        preload = ["torch", "torch.distributed", *sorted(modules)]
        launch(f"{__name__}:write_ranks", json.dumps(payload), ranks, preload)
        folders |= {name: out / str(number) / "step-1" for number, name in enumerate(cases)}
    return folders


@pytest.mark.world
@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_a_checkpoint(name: str, written: dict[str, Path]) -> None:
    """Each part to the byte; nothing is stored beside the parts."""
    stored = dict.fromkeys(PARTS, 0)
    part_of = {kind: part for part, kinds in PARTS.items() for kind in kinds}
    for file in open_checkpoint(str(written[name])).files:
        for row in file["slices"]:
            stored[part_of[row["kind"].partition("@")[0]]] += row["bytes"]
    assert checkpoint_bytes(CASES[name]) == stored
    assert (stored["errors"] > 0) == CASES[name].compress.on


@pytest.mark.world
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("mean")])
def test_the_mean_is_spread_over_the_replicas(name: str, written: dict[str, Path]) -> None:
    """No rank stores more than its run of the mean, and a matrix is stored once."""
    reader = open_checkpoint(str(written[name]))
    shares = [
        sum(row["bytes"] for row in file["slices"] if row["kind"] == "error")
        for file in reader.files
    ]
    assert max(shares) * len(shares) <= sum(shares) + 4 * len(shares) ** 2
    assert all(reader.kinds(n).count("error") <= 1 for n in reader.shapes())
    for matrix in (n for n in reader.shapes() if "error" in reader.kinds(n)):
        assert reader.tensor(matrix, "error").shape == reader.shape(matrix, "master")


@pytest.mark.world
def test_tied_heads_are_loaded_on_another_mesh(written: dict[str, Path], tmp_path: Path) -> None:
    """One process -> PP2 x DP2, where both stages hold the table -> one process."""
    _write(ALONE, own_mesh(), tmp_path, str(written[START]))
    one, pipe = (open_checkpoint(str(p)) for p in (tmp_path / "step-1", written[TIED]))
    assert one.shapes() == pipe.shapes() and not any("head.weight" in n for n in one.shapes())
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        mine, theirs = (
            torch.cat([reader.tensor(name, kind).flatten() for name in one.shapes()])
            for reader in (one, pipe)
        )
        assert (mine - theirs).norm() < BOUND["fp32"] * mine.norm(), kind
    again = _engine(ALONE, own_mesh(), str(written[TIED]))
    for piece in again.state_slices():
        stored = pipe.flat(piece.name, piece.kind, piece.start, piece.stop)
        assert stored.equal(piece.data.flatten().float()), (piece.name, piece.kind)
    again.close()


def test_the_12b_preset_takes_at_most_250_gb() -> None:
    """12,292,587,008 parameters, 64 blocks of 12 matrices' worth of 3968 x 3968 in errors."""
    paper = settings_of("paper_12b", 0)
    nodes = replace(paper, mesh=MeshConfig(data=1024, nodes=128))
    zero3 = replace(nodes, engine=EngineConfig(name="deepspeed_zero", zero_stage=3))
    parts = checkpoint_bytes(zero3)
    assert parts["masters"] == parts["average"] == 4 * 12_292_587_008
    assert parts["moments"] == 8 * 12_292_587_008
    assert parts["errors"] == 4 * 64 * 12 * 3968**2 == 48_368_713_728
    assert sum(parts.values()) < 250e9
    each = replace(zero3, checkpoint=CheckpointConfig(errors="own"))
    assert checkpoint_bytes(each)["errors"] == 128 * parts["errors"]
