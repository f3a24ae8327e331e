"""ZeRO-3 starts without a whole model on any rank, from the weights that one process draws."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.parity import OPTIM
from cluster.launcher import launch
from core.memory import keep_freed_memory
from models.config import DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.prior import prior_program
from parallel.config import CPU_BUCKET as BUCKET
from parallel.config import CompressConfig, EngineConfig, MeshConfig
from parallel.engines.deepspeed import zero as deepspeed_zero
from parallel.engines.protocol import EngineSettings, Layer, Program
from parallel.engines.registry import build_engine, modules_of
from parallel.mesh import Mesh, build_mesh
from parallel.world import join_world, leave_world

RANKS = 4
MODEL = PriorConfig(
    dim=512, heads=8, layers=10, text_length=16, text_vocabulary=4096, image_vocabulary=2048, grid=4
)
"""151 MB in 12 layers of 13 MB each."""
FIRST = PriorConfig(
    dim=48, heads=6, layers=1, text_length=6, text_vocabulary=50, image_vocabulary=30, grid=4
)
"""Built before, so that imports and code pages do not count."""
SETTINGS = EngineSettings(
    optim=OPTIM,
    engine=EngineConfig(name="deepspeed_zero", zero_stage=3),
    compress=CompressConfig(),
    seed=0,
)


def measure_ranks(payload: str) -> None:
    """Build engines on this rank and look at memory and weights; writes result-RANK.json."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as ranks on CPUs do
    world = join_world()
    mesh = build_mesh(MeshConfig(data=RANKS), world)
    build_engine(prior_program(FIRST, 0), SETTINGS, mesh).close()
    figures = {**_grown(prior_program(MODEL, 0), mesh), "dvae": _built_before(mesh)}
    Path(json.loads(payload)["out"], f"result-{world.rank}.json").write_text(json.dumps(figures))
    leave_world(world)


def _grown(program: Program, mesh: Mesh) -> dict[str, Any]:
    """Growth of peak memory until the weights, and until the engine, exist; equal weights."""
    gc.collect()
    mesh.world.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, grown = _kilobytes("VmRSS"), {}
    initialize = deepspeed_zero.initialize

    def initialize_noted(*arguments: Any) -> Any:
        grown["weights"] = 1024 * (_kilobytes("VmHWM") - before)
        return initialize(*arguments)

    deepspeed_zero.initialize = initialize_noted
    engine: Any = build_engine(program, SETTINGS, mesh)
    deepspeed_zero.initialize = initialize
    grown["engine"] = 1024 * (_kilobytes("VmHWM") - before)
    layers = {layer.name: dict(layer.build().named_parameters()) for layer in program.layers}
    sizes = {name: 4 * sum(p.numel() for p in layer.values()) for name, layer in layers.items()}
    drawn = {f"{name}.{n}": p for name, layer in layers.items() for n, p in layer.items()}
    return {
        **grown,
        **_compared(engine, drawn),
        "gradients": engine.memory()["gradients"],
        "model": sum(sizes.values()),
        "largest": max(sizes.values()),
    }


def _built_before(mesh: Mesh) -> dict[str, Any]:
    """A module built before the engine, different on each rank."""
    config = DVAEConfig(pixels=16, width=8)
    dvae = DVAE(config, seed=mesh.world.rank)
    layer = Layer(name="dvae", build=lambda: dvae)
    program = Program(layers=[layer], loss=_no_loss, losses=("loss",))
    engine = build_engine(program, SETTINGS, mesh)
    first = {f"dvae.{n}": p for n, p in DVAE(config, seed=0).named_parameters()}
    return _compared(engine, first)


def _compared(engine: Any, whole: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Number of elements on this rank, and the parameters in which one differs."""
    mine = [part for part in engine.state_slices() if part.kind == "master"]
    unlike = [
        part.name
        for part in mine
        if not whole[part.name].reshape(-1)[part.start :][: part.data.numel()].equal(part.data)
    ]
    return {
        "elements": sum(p.data.numel() for p in mine),
        "unlike": unlike,
        "all": sum(p.numel() for p in whole.values()),
    }


def _no_loss(output: Any, batch: Any) -> Any:
    return {}


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    preload = ["torch", "torch.distributed", *modules_of("deepspeed_zero", False)]
    launch(f"{__name__}:measure_ranks", json.dumps({"out": str(out)}), RANKS, preload)
    return [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_no_rank_holds_more_than_its_shard_and_a_layer(ranks: list[dict[str, Any]]) -> None:
    """The engine adds gradients, a shard as large as the weights', and DeepSpeed's bucket."""
    for rank in ranks:
        most = rank["model"] / RANKS + rank["largest"]
        assert rank["weights"] <= most
        assert rank["engine"] - rank["gradients"] - 4 * BUCKET <= most


@pytest.mark.slow
def test_the_shards_equal_the_weights_of_one_process_bit_for_bit(
    ranks: list[dict[str, Any]],
) -> None:
    """A module built before the engine takes the first rank's weights."""
    for rows in (ranks, [rank["dvae"] for rank in ranks]):
        assert [rank["unlike"] for rank in rows] == [[]] * RANKS
        assert sum(rank["elements"] for rank in rows) == rows[0]["all"]
