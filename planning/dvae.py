"""The plan of a dVAE: memory and time of data-parallel layouts, from its own operations.

The whole step, noise and backward pass included, runs on fake tensors (sizes and types, no
values). Each convolution counts as a matmul, every other operation as memory traffic.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.keyed_noise
from core.memory import size_text
from models.config import DVAEConfig
from models.dvae import CHANNELS, DVAE
from models.keyed_noise import philox_bits
from parallel.config import EngineConfig, MeshConfig
from parallel.engines.frozen import freeze
from parallel.engines.protocol import Program
from parallel.mesh import RankCoordinates
from parallel.placement import placement_of
from planning.decode import buffer_bytes, decoding
from planning.estimate.hardware import Hardware
from planning.estimate.kernels import Kernels, Work, flops, seconds
from planning.estimate.layers import Held, RankLayer, named, noted
from planning.estimate.memory import CATEGORIES, Bytes, Loads, model_bytes
from planning.estimate.pipeline_schedule import Span
from planning.estimate.reserve import nccl_bytes, start_up
from planning.estimate.search import Candidate, SearchResult, Timed, precision_of
from planning.estimate.step_time import HOURS, Estimate, ending_seconds
from planning.rehearsal.patches import replaced
from training.config import DVAETrain
from training.tasks.dvae_program import ExtraLosses, dvae_program

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What the operations of one micro-batch take."""

    work: Work
    saved: int
    """Bytes that autograd saves."""
    largest: int
    """Bytes of the largest tensor."""


def search_dvae(settings: DVAETrain, world: int, hardware: Hardware) -> SearchResult:
    """The fastest data-parallel layouts on `world` ranks, as `search` gives those of a prior."""
    timed, rejected = [], []
    for layout in _layouts(settings, world, hardware):
        candidates = [_weigh(variant, world, hardware) for variant in _variants(layout)]
        fitting = [candidate for candidate in candidates if not candidate.why]
        if fitting:
            rows = [Timed(candidate=c, estimate=_estimate(c, hardware)) for c in fitting]
            timed.append(min(rows, key=lambda row: row.estimate.seconds))
        else:
            rejected.append(min(candidates, key=lambda c: (c.total == 0, c.total)))
    timed.sort(key=lambda row: row.estimate.seconds)
    return SearchResult(timed=timed, rejected=rejected)


def _layouts(settings: DVAETrain, world: int, hardware: Hardware) -> Iterator[DVAETrain]:
    asked = precision_of(cast(Any, settings), hardware)
    precision = asked if asked == "bf16" else "fp32"  # fp16 needs gradient scales
    stages = [("reference", 1)] + [("deepspeed_zero", 1)] * (world > 1)
    for name, stage in stages:
        engine = EngineConfig(name=name, zero_stage=stage, precision=precision)  # type: ignore[arg-type]
        yield replace(settings, mesh=MeshConfig(data=world), engine=engine)


def _variants(layout: DVAETrain) -> Iterator[DVAETrain]:
    """Every micro-batch size."""
    samples = max(layout.loop.global_batch_size // layout.mesh.data, 1)
    for micro in (2**i for i in range(samples.bit_length())):
        if samples % micro == 0:
            engine = replace(layout.engine, gradient_accumulation_steps=samples // micro)
            yield replace(layout, engine=engine)


def _loads(settings: DVAETrain) -> Loads:
    parameters, buffers = _held(settings.model, ExtraLosses.of(settings), settings.freeze)
    layer = RankLayer(name="dvae", cost=1, parameters=parameters, buffers=buffers)
    return Loads(
        settings=cast(Any, settings),
        at=RankCoordinates(),
        chunks=((layer,),),
        held=named((layer,)),
    )


def _weigh(settings: DVAETrain, world: int, hardware: Hardware) -> Candidate:
    problems = settings.problems(world)
    if problems:
        return Candidate(settings=cast(Any, settings), bytes_={}, why="; ".join(problems))
    loads = _loads(settings)
    one = _micro_batch_of(settings, loads.micro)
    sizes = {**dict.fromkeys(CATEGORIES, 0), **model_bytes(loads), "activations": one.saved}
    sizes["temporary"] += 2 * one.largest  # a gradient and its operand's
    sizes["temporary"] += sum(part.buffers for part in loads.layers)
    bytes_: Bytes = {name: sizes[name] for name in CATEGORIES}
    bytes_ |= nccl_bytes(cast(Any, settings), hardware)
    start, usable = None, hardware.usable
    if hardware.cores:  # ranks of one machine share its memory
        usable /= world
        bytes_["temporary"] += buffer_bytes(settings)
    else:
        start = replace(start_up(loads, hardware), loader=buffer_bytes(settings))
    why = start.problem(hardware) if start else ""
    if sum(bytes_.values()) > usable:
        most = max(bytes_, key=lambda name: bytes_[name])
        why = (
            f"needs {size_text(sum(bytes_.values()))} a rank, {size_text(usable)} of "
            f"{hardware.name} can be used; {size_text(bytes_[most])} of it are {most}"
        )
    return Candidate(settings=cast(Any, settings), bytes_=bytes_, start=start, why=why)


def _estimate(candidate: Candidate, hardware: Hardware) -> Estimate:
    settings: DVAETrain = cast(Any, candidate.settings)
    loads, mesh, loop = _loads(settings), settings.mesh, settings.loop
    times = settings.engine.gradient_accumulation_steps
    one = _micro_batch_of(settings, loads.micro)
    crowd = hardware.crowd(mesh.world)
    compute = crowd * times * seconds(one.work, hardware)
    end = {name: crowd * value for name, value in ending_seconds(loads, hardware).items()}
    own = hardware.engine_overhead if settings.engine.name != "reference" else 0.0
    parts = {"compute": compute, **end, "overhead": crowd * (hardware.step_overhead + own)}
    pictures = decoding(settings, settings.model.pixels, sum(parts.values()), hardware)
    parts["data"] = pictures.wait_seconds
    total = sum(parts.values())
    hours = total * loop.steps / HOURS
    done = flops(one.work) * times * mesh.data
    return Estimate(
        seconds=total,
        compute=compute,
        bubble=0.0,
        exposed=end["gradients"] + end["weights"] + end["results"],
        parts=parts,
        mfu=done / (total * mesh.world * hardware.half_flops),
        tokens_per_second=loop.global_batch_size * settings.model.tokens / total,
        days=hours / 24,
        cost=hours * mesh.world * hardware.cost_per_hour,
        traffic={},
        spans=[Span(stage=0, kind="forward", micro=0, begin=0.0, end=compute)],
        decoding=pictures,
    )


def dvae_parameters(config: DVAEConfig) -> int:
    """Parameters of the whole model, without a discriminator's."""
    return sum(held.numel for held in _held(config, ExtraLosses(), "")[0].values())


def dvae_trained(settings: DVAETrain) -> int:
    """Parameters of the model that a run trains, without a discriminator's."""
    held = _held(settings.model, ExtraLosses(), settings.freeze)[0].values()
    return sum(each.numel for each in held if each.trained)


def dvae_names(settings: DVAETrain) -> dict[str, Held]:
    """Global parameter name -> parameter, those of a discriminator too."""
    return dict(_loads(settings).held)


@lru_cache(maxsize=8)
def _held(config: DVAEConfig, extra: ExtraLosses, frozen: str) -> tuple[dict[str, Held], int]:
    """A rank's parameters, and the bytes of its other tensors; `frozen` as StageConfig.freeze."""
    layer = _program(config, extra, frozen).layers[0].build()
    parameters = {
        n: Held(placement_of(p), p.numel(), p.requires_grad) for n, p in layer.named_parameters()
    }
    return parameters, sum(map(_bytes, layer.buffers()))


def _program(config: DVAEConfig, extra: ExtraLosses | None, frozen: str) -> Program:
    """A dVAE's program without values."""
    with torch.device("meta"):
        return freeze(dvae_program(DVAE(config), config, extra), frozen)


def _micro_batch_of(settings: DVAETrain, samples: int) -> MicroBatch:
    extra = ExtraLosses.of(settings)
    return micro_batch(settings.model, samples, settings.engine.precision, extra, settings.freeze)


@lru_cache(maxsize=64)
def micro_batch(
    config: DVAEConfig,
    samples: int,
    precision: str,
    extra: ExtraLosses | None = None,
    frozen: str = "",
) -> MicroBatch:
    """The operations of a forward and a backward pass, in the precision of the run."""
    program = _program(config, extra, frozen)
    layer = program.layers[0].build()
    saved: dict[str, int] = {}
    on_gpu = (models.keyed_noise, "draw_bits", _drawn_on_a_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True), _Tally() as tally, replaced([on_gpu]):
        layer.to_empty(device="cpu")
        tally.work.clear()
        pixels = torch.empty(samples, CHANNELS, config.pixels, config.pixels, device="cpu")
        keys = torch.zeros(samples, dtype=torch.int64, device="cpu")
        one = torch.tensor(1.0, device="cpu")  # a constant: its value is read
        batch = {"pixels": pixels, "keys": keys, "tau": one, "beta": one, "adversarial": one}
        half = precision != "fp32"
        outside = [*layer.parameters(), *layer.buffers(), pixels, keys, one]
        with noted(saved, "all", outside), torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = program.loss(layer(batch), batch)["loss"]
        loss.backward()
    return MicroBatch(work=tuple(tally.work), saved=saved["all"], largest=tally.largest)


def _drawn_on_a_gpu(keys: Tensor, count: int, position: int) -> Tensor:
    """As `draw_bits` on a GPU; on a CPU NumPy would draw them."""
    return philox_bits(keys, -(-count // 8), position)[:, :count]


class _Tally(TorchDispatchMode):
    """Notes each operation as a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Kernels] = []
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        out = function(*arguments, **(named or {}))
        if function.is_view or function in (_aten.empty.memory_format, _aten.detach.default):
            return out
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        moved = float(sum(map(_bytes, results + given)))
        self.largest = max([self.largest, *map(_bytes, results)])
        if function is _aten.convolution.default:
            self.work.append(_convolution(results[0], given[1], given[0], moved))
        elif function is _aten.convolution_backward.default:
            gradient, x, weight = given[:3]
            times = sum(arguments[-1][:2])  # pixels and frozen weights need no gradient
            one = _convolution(gradient, weight, x, moved / max(times, 1))
            self.work += [one] * times or [Kernels(moved=moved)]
        else:
            self.work.append(Kernels(moved=moved))
        return out


def _convolution(out: Tensor, weight: Tensor, x: Tensor, moved: float) -> Kernels:
    """A convolution as a matmul; those of its two gradients have as many operations."""
    samples, columns, height, width = out.shape
    return Kernels(
        rows=samples * height * width,
        columns=columns,
        inner=weight[0].numel(),
        half=x.element_size() < _FULL,
        moved=moved,
    )


_FULL = 4


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
