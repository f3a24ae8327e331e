"""The counts of `tapir plan` equal what live engines allocate, send and keep."""

import json
import weakref
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.parity import BATCH, OPTIM, SEED, Case, batch_of, program_of
from cluster.launcher import launch
from core.config import from_json
from core.heartbeat import Heart
from models.config import LoraConfig, PriorConfig
from parallel.config import CompressConfig, EngineConfig, EngineName, MeshConfig
from parallel.engines.fsdp.units import whole_parameters
from parallel.engines.protocol import EngineSettings
from parallel.engines.rebuilt import watched
from parallel.engines.registry import build_engine, modules_of
from parallel.ledger import Ledger, recorded
from parallel.mesh import Mesh, build_mesh, coordinates_of
from parallel.world import join_world, leave_world
from planning.estimate.memory import Loads, loads_of, rank_bytes
from planning.estimate.reserve import communicators
from planning.estimate.traffic import step_traffic
from training.config import LoopConfig, PriorTrain

SMALL = PriorConfig(
    dim=48, heads=6, layers=5, text_length=6, text_vocabulary=50, image_vocabulary=30, grid=4
)
WIDE = PriorConfig(
    dim=192, heads=3, layers=3, text_length=8, text_vocabulary=900, image_vocabulary=200, grid=4
)
"""Over 2^20 elements, so that there are several buckets, and matrices that ZeRO-3 cuts."""
TIED = replace(SMALL, tied=True)
MODERN: dict[str, Any] = {
    "norm": "rms",
    "qk_norm": True,
    "positions": "rotary",
    "mlp": "gated",
    "tied": True,
    "columns": 5,
}
"""Every option that differs from the paper."""
SELECTIVE: dict[str, Any] = {"recompute": True, "recompute_granularity": "selective"}

NARROW: dict[str, Any] = {"reduce_precision": "16-bit"}
TP2 = MeshConfig(tensor=2, sequence_parallel=True)


def _case(
    name: str,
    mesh: MeshConfig,
    owner: EngineName,
    model: PriorConfig = SMALL,
    rank: int = 0,
    payload: Literal["fp32", "bf16"] = "fp32",
    moments: Literal["fp32", "bf16"] = "fp32",
    lora: int = 0,
    freeze: str = "",
    **engine: Any,
) -> Case:
    settings = EngineConfig(name=owner, gradient_accumulation_steps=2, **engine)
    compress = CompressConfig(rank=rank, payload=payload)
    return Case(
        name=name,
        mesh=mesh,
        engine=settings,
        compress=compress,
        moments=moments,
        model=model,
        lora=LoraConfig(rank=lora),
        freeze=freeze,
    )


CASES = [
    _case("plain", MeshConfig(data=2), "reference"),
    _case("plain, compressed", MeshConfig(data=2), "reference", rank=8, precision="bf16"),
    _case("plain, 16-bit factors", MeshConfig(data=2), "reference", rank=8, payload="bf16"),
    _case("selective", MeshConfig(data=2), "reference", precision="bf16", **SELECTIVE),
    _case("ZeRO-1, buckets", MeshConfig(data=2), "deepspeed_zero", reduce_bucket_size=9000),
    _case("ZeRO-1, wide", MeshConfig(data=2), "deepspeed_zero", WIDE, precision="bf16"),
    _case("ZeRO-2", MeshConfig(data=2), "deepspeed_zero", zero_stage=2, moments="bf16"),
    _case("ZeRO-3, wide", MeshConfig(data=2), "deepspeed_zero", WIDE, zero_stage=3),
    _case("plain, adapters", MeshConfig(data=2), "reference", lora=3),
    _case("ZeRO-3, adapters", MeshConfig(data=2), "deepspeed_zero", WIDE, lora=2, zero_stage=3),
    _case(
        "ZeRO-3, frozen",
        MeshConfig(data=2),
        "deepspeed_zero",
        WIDE,
        freeze="embedding|block000|up.weight",
        zero_stage=3,
    ),
    _case(
        "ZeRO-3, modern",
        MeshConfig(data=2),
        "deepspeed_zero",
        replace(WIDE, **MODERN),
        zero_stage=3,
    ),
    _case("PP2", MeshConfig(pipeline=2), "deepspeed_pipe", precision="bf16"),
    _case("TP4, padded heads", MeshConfig(tensor=4), "deepspeed_pipe"),
    _case("TP2 x PP2", MeshConfig(tensor=2, pipeline=2), "deepspeed_pipe", precision="bf16"),
    _case(
        "TP2 x PP2, modern",
        MeshConfig(tensor=2, pipeline=2),
        "deepspeed_pipe",
        replace(WIDE, **MODERN),
        precision="bf16",
    ),
    _case("PP4, tied", MeshConfig(pipeline=4), "deepspeed_pipe", replace(WIDE, tied=True)),
    _case("PP2 x DP2, tied", MeshConfig(pipeline=2, data=2), "deepspeed_pipe", TIED),
    _case("PP2 x DP2, compressed", MeshConfig(pipeline=2, data=2), "deepspeed_pipe", rank=8),
    _case("TP2 x DP2", MeshConfig(tensor=2, data=2), "deepspeed_zero", WIDE, precision="bf16"),
    _case(
        "TP2 x PP2, modern, adapters",
        MeshConfig(tensor=2, pipeline=2),
        "deepspeed_pipe",
        replace(SMALL, **MODERN),
        lora=3,
    ),
    _case("SP2 x PP2", replace(TP2, pipeline=2), "deepspeed_pipe", precision="bf16"),
    _case(
        "SP2 x PP2, modern, selective",
        replace(TP2, pipeline=2),
        "deepspeed_pipe",
        replace(WIDE, **MODERN, text_length=10),
        precision="bf16",
        **SELECTIVE,
    ),
    _case("SP2, adapters", TP2, "deepspeed_pipe", lora=3, **SELECTIVE),
    _case("SP2 x DP2, ZeRO-1", replace(TP2, data=2), "deepspeed_zero", precision="bf16"),
    _case(
        "SP2 x DP2, ZeRO-2, compressed, frozen",
        replace(TP2, data=2),
        "deepspeed_zero",
        rank=8,
        freeze="embedding|block000|attention_norm|head.text",
        zero_stage=2,
        **SELECTIVE,
    ),
    _case(
        "PP2 x DP2, compressed, frozen",
        MeshConfig(pipeline=2, data=2),
        "deepspeed_pipe",
        rank=8,
        freeze=r"embedding|block000\.[qkvoa]|up.weight",
    ),
    _case(
        "TP2 x DP2, frozen",
        MeshConfig(tensor=2, data=2),
        "deepspeed_zero",
        freeze="embedding|block000|attention_norm|head.text",
    ),
    _case(
        "paper",
        MeshConfig(data=4, nodes=2),
        "deepspeed_zero",
        WIDE,
        rank=16,
        zero_stage=3,
    ),
    _case(
        "paper, adapters",
        MeshConfig(data=4, nodes=2),
        "deepspeed_zero",
        WIDE,
        lora=2,
        zero_stage=3,
    ),
    _case("torch, wide", MeshConfig(data=2), "torch", WIDE),
    _case("torch, modern", MeshConfig(data=2), "torch", replace(WIDE, **MODERN), precision="bf16"),
    _case("torch, adapters", MeshConfig(data=2), "torch", WIDE, lora=3, moments="bf16"),
    _case(
        "torch, frozen",
        MeshConfig(data=2),
        "torch",
        WIDE,
        freeze="embedding|block000|block001|up.weight",
    ),
    _case("torch, DP4", MeshConfig(data=4), "torch", precision="bf16", **NARROW),
    _case("torch, TP2 x DP2", MeshConfig(tensor=2, data=2), "torch", WIDE, precision="bf16"),
    _case("torch, SP2 x DP2", replace(TP2, data=2), "torch", WIDE, precision="bf16"),
    _case("torch, PP2", MeshConfig(pipeline=2), "torch", WIDE),
    _case("torch, PP2, tied", MeshConfig(pipeline=2), "torch", TIED, schedule="zero-bubble"),
    _case(
        "torch, PP2, interleaved, recompute",
        MeshConfig(pipeline=2),
        "torch",
        replace(SMALL, layers=6),
        schedule="interleaved",
        virtual_stages=3,
        **SELECTIVE,
    ),
    _case(
        "torch, PP2 x DP2, interleaved",
        MeshConfig(pipeline=2, data=2),
        "torch",
        precision="bf16",
        schedule="interleaved",
        virtual_stages=2,
        **NARROW,
    ),
    _case(
        "torch, SP2 x PP2, zero bubble",
        replace(TP2, pipeline=2),
        "torch",
        precision="bf16",
        schedule="zero-bubble",
        virtual_stages=2,
    ),
    _case("torch, 2 nodes", MeshConfig(data=4, nodes=2), "torch", WIDE, **NARROW),
    _case("torch, 2 nodes, compressed", MeshConfig(data=4, nodes=2), "torch", WIDE, rank=16),
    _case("SP2 x DP2, ZeRO-3", replace(TP2, data=2), "deepspeed_zero", WIDE, zero_stage=3),
    _case("PP2, modern", MeshConfig(pipeline=2), "deepspeed_pipe", replace(SMALL, **MODERN)),
]
"""Those of ZeRO-3 come last among 4 ranks: DeepSpeed then replaces torch's linear function by one
that saves no weights in 16 bits."""
TRAFFIC_ONLY = [
    _case("recompute", MeshConfig(tensor=2, pipeline=2), "deepspeed_pipe", recompute=True),
    _case("SP2 x PP2, recompute", replace(TP2, pipeline=2), "deepspeed_pipe", recompute=True),
    _case("torch, fp16", MeshConfig(data=2), "torch", WIDE, precision="fp16"),
    _case("torch, TP2, fp16", MeshConfig(tensor=2), "torch", precision="fp16"),
]


def planned(case: Case, rank: int) -> Loads:
    """The plan's view of a rank of a case."""
    settings = PriorTrain(
        model=case.model,
        loop=LoopConfig(global_batch_size=BATCH),
        mesh=case.mesh,
        engine=case.engine,
        compress=case.compress,
        optim=replace(OPTIM, moments=case.moments),
        lora=case.lora,
        freeze=case.freeze,
    )
    return loads_of(settings, coordinates_of(case.mesh, rank), emulates=True)


class Kept:
    """Peak bytes of tensors that autograd holds, each storage counted once."""

    def __init__(self, weights: list[torch.nn.Parameter], batches: Iterable[Tensor]) -> None:
        self._weights, self._outside = weights, {_key(x) for x in batches}
        self._counts: dict[int, int] = {}
        self._now = self.peak = 0

    def pack(self, x: Tensor) -> Any:
        key = _key(x)
        if key in self._outside or any(key == _key(w) for w in self._weights):
            return x
        if not self._counts.get(key):
            self._now += x.untyped_storage().nbytes()
            self.peak = max(self.peak, self._now)
        self._counts[key] = self._counts.get(key, 0) + 1
        held = _Box(x)
        weakref.finalize(held, self._drop, key, x.untyped_storage().nbytes())
        return held

    def unpack(self, held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Box) else held

    def _drop(self, key: int, count: int) -> None:
        self._counts[key] -= 1
        self._now -= 0 if self._counts[key] else count


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each counted once."""
    return sum({_key(x): x.untyped_storage().nbytes() for x in tensors}.values())


def measure_ranks(payload: str) -> None:
    """Train two steps of every case on this rank, and count; writes result-RANK.json."""
    body = json.loads(payload)
    world = join_world()
    torch.set_float32_matmul_precision("highest")
    figures = {}
    with recorded(Mesh(world=world)) as ledger:  # DeepSpeed keeps references to the first functions
        for row in body["cases"]:
            case = from_json(Case, row)
            before = set(_groups())
            mesh = build_mesh(case.mesh, world)
            built = [group for group in _groups() if group not in before]
            figures[case.name] = _measure(case, mesh, ledger)
            for group in built:  # gloo's threads poll: those of all cases would fill the cores
                dist.destroy_process_group(group)
            del mesh, built
    Path(body["out"], f"result-{world.rank}.json").write_text(json.dumps(figures))
    leave_world(world)


def _groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)


def _measure(case: Case, mesh: Mesh, ledger: Ledger) -> dict[str, Any]:
    Ledger.__init__(ledger, mesh, Heart(mesh.world.rank))
    seen: dict[str, int] = {}
    settings = EngineSettings(
        optim=replace(OPTIM, moments=case.moments),
        engine=case.engine,
        compress=case.compress,
        seed=SEED,
        judge=lambda norm, loss: _at_update(engine, seen),
    )
    engine: Any = build_engine(program_of(case, mesh), settings, mesh)
    sharded = case.engine.name == "torch"
    weights = [p for layer in engine.layers().values() for p in layer.parameters()]
    weights = list(engine._masters.values()) if sharded else weights
    seen["whole"] = 0
    for weight in (weight for weight in weights if weight.requires_grad):
        weight.register_post_accumulate_grad_hook(lambda _: _at_gradient(weights, seen))
    for step in range(2):
        micro = _micro_batches(case, step, mesh.data.rank)
        gathered = whole_parameters(engine._units) if sharded else []
        kept = Kept([*weights, *gathered], [x for batch in micro for x in batch.values()])
        with ledger.counted() as traffic, watched(kept.pack, kept.unpack):
            engine.step(micro, 1e-4)
    carrying = {handle or dist.group.WORLD for handle in ledger._group_labels}
    sizes = sorted(n for n in map(dist.get_world_size, carrying) if n > 1)
    sizes_in_bytes = {**_model_bytes(engine, weights, seen), "activations": kept.peak}
    says = engine.memory()
    counts = traffic.counts
    with ledger.counted() as traffic:
        if not engine.frozen():
            engine.load_frozen(None)
    engine.close()
    return {
        "bytes": sizes_in_bytes,
        "comm": counts,
        "frozen": traffic.counts,
        "says": says,
        "groups": sizes,
    }


def _micro_batches(case: Case, step: int, replica: int) -> list[dict[str, Tensor]]:
    whole = batch_of(step, case.model)
    mine = {name: x[replica :: case.mesh.data] for name, x in whole.items()}
    parts = {name: x.chunk(case.engine.gradient_accumulation_steps) for name, x in mine.items()}
    return [
        {name: x[i] for name, x in parts.items()}
        for i in range(case.engine.gradient_accumulation_steps)
    ]


def _at_gradient(weights: list[torch.nn.Parameter], seen: dict[str, int]) -> None:
    seen["whole"] = max(seen["whole"], _bytes(w.grad for w in weights if w.grad is not None))


def _at_update(engine: Any, seen: dict[str, int]) -> str:
    """Gradients that exist when the update is decided."""
    optimizer = getattr(getattr(engine, "_engine", None), "optimizer", None)
    if engine.name == "torch":
        shards = engine._buckets.gradients().values()
        vectors = [p.grad for p in engine._masters.values() if p.grad is not None]
        seen["partial"] = _bytes([*shards, *vectors])
    if optimizer is not None:
        parts = [g for group in optimizer.averaged_gradients.values() for g in group]
        seen["partial"] = _bytes(parts)
    return ""


def _model_bytes(
    engine: Any, weights: list[torch.nn.Parameter], seen: dict[str, int]
) -> dict[str, int]:
    outer = getattr(getattr(engine, "_engine", None), "optimizer", None)
    optimizer = outer.optimizer if outer is not None else engine._optimizer
    states = [s for row in optimizer.state.values() for n, s in row.items() if n != "step"]
    masters, held = [], list(weights)
    if outer is not None:
        third = hasattr(outer, "fp32_partitioned_groups_flat")
        masters = (
            outer.fp32_partitioned_groups_flat if third else (outer.single_partition_of_fp32_groups)
        )
        held += [w.ds_tensor for w in weights if hasattr(w, "ds_tensor")]  # type: ignore[misc]
    sharded = engine.name == "torch" or (engine.name == "deepspeed_zero" and engine._stage > 1)
    weights_alone = {_key(x) for x in held}
    return {
        "parameters": _bytes(held),
        "gradients": seen["partial"] if sharded else seen["whole"],
        "optimizer": _bytes([*(m for m in masters if _key(m) not in weights_alone), *states]),
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank counted; one world for all cases of a size."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for world in (2, 4):
        out = tmp_path_factory.mktemp(f"world{world}")
        cases = [case for case in [*CASES, *TRAFFIC_ONLY] if case.mesh.world == world]
        payload = {"out": str(out), "cases": [asdict(case) for case in cases]}
        modules = {m for case in cases for m in modules_of(case.engine.name, True)}
        preload = ["torch", "torch.distributed", *sorted(modules)]
        launch(f"{__name__}:measure_ranks", json.dumps(payload), world, preload)
        ranks = [json.loads((out / f"result-{r}.json").read_text()) for r in range(world)]
        by_case |= {case.name: [rank[case.name] for rank in ranks] for case in cases}
    return by_case


@pytest.mark.world
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_of_every_rank(case: Case, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Weights, gradients and optimiser state to the byte, activations within 10%."""
    for rank, real in enumerate(measured[case.name]):
        plan, counted = rank_bytes(planned(case, rank)), real["bytes"]
        for category in ("parameters", "gradients", "optimizer"):
            assert plan[category] == counted[category], f"rank {rank}: {category}"
            assert real["says"][category] == counted[category], f"rank {rank} says of {category}"
        assert abs(plan["activations"] / counted["activations"] - 1) < 0.1, f"rank {rank}"


@pytest.mark.world
@pytest.mark.parametrize("case", [*CASES, *TRAFFIC_ONLY], ids=lambda case: case.name)
def test_traffic_of_every_rank(case: Case, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Calls and bytes of every collective, by group and operation, equal the ledger's."""
    for rank, real in enumerate(measured[case.name]):
        assert step_traffic(planned(case, rank)) == real["comm"], f"rank {rank}"
        assert not real["frozen"], "loading the frozen weights of a run without any sends bytes"


@pytest.mark.world
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_process_groups_of_every_rank(
    case: Case, measured: dict[str, list[dict[str, Any]]]
) -> None:
    """Groups that communicate: NCCL allocates buffers for each."""
    for rank, real in enumerate(measured[case.name]):
        plan = planned(case, rank)
        sizes = sorted(ranks for ranks, _ in communicators(plan.settings, plan.at.stage))
        assert sizes == real["groups"], f"rank {rank}"
