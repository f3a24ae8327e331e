"""Count the parameters and saved activations of one rank's real modules, without values.

Parameters are on the meta device. The forward pass runs on fake CPU tensors (sizes and types, no
values) in the precision of the run, and hooks record the tensors that autograd saves for backward.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from models.adapters import attach
from models.attention.rotary import rotary_table
from models.config import LoraConfig, PriorConfig
from models.prior import PriorBlock, PriorEmbedding, PriorHead, prior_layers, prior_loss
from parallel.engines.rebuilt import watched
from parallel.placement import Placement, placement_of
from parallel.tensor.ops import TensorParallel
from training.config import PriorTrain

Keeps = dict[str, tuple[int, int]]
"""Part of a layer -> (bytes saved per sample, bytes saved whatever the batch)."""


class FakeTensorParallel(TensorParallel):
    """One tensor-parallel rank without its group: layers get their shapes and reduce nothing."""

    def __init__(self, rank: int, size: int, sequence: bool = False) -> None:
        self.rank, self.size, self.sequence = rank, size, sequence

    def gather_sequence(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), x.shape[1] * self.size, x.shape[2])

    def scatter_sum(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), x.shape[1] // self.size, x.shape[2])

    def embedding(self, rows: int, width: int) -> nn.Module:
        return nn.Embedding(rows // self.size, width)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.size == 1:
            return super().cross_entropy(logits, targets)
        losses: Tensor = _SharedLoss.apply(logits, targets)
        return losses


class _SharedLoss(Function):
    """Saves what megatron-core's vocabulary-parallel cross-entropy saves for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        shares, outside = torch.empty_like(logits), torch.empty_like(targets, dtype=torch.bool)
        ctx.save_for_backward(shares, outside, torch.empty_like(targets))
        return torch.empty_like(targets, dtype=torch.float32)


class _Attention(Function):
    """Saves what banded attention on CPUs and FlexAttention on GPUs save for backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out


class _ShapeBlock(PriorBlock):
    """The real block except for the attention kernel."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Attention.apply(q, k, v)
        return out


@dataclass(frozen=True, kw_only=True)
class RankLayer:
    """A layer as one tensor rank holds it."""

    name: str
    """As in `prior_layers`."""
    cost: int
    parameters: dict[str, "Held"]
    """By name within the layer."""
    buffers: int
    """Bytes of masks."""

    @property
    def frozen(self) -> frozenset[str]:
        """Names of its frozen parameters."""
        return frozenset(name for name, held in self.parameters.items() if not held.trained)


@dataclass(frozen=True)
class Held:
    """A parameter of this rank."""

    placement: Placement
    numel: int
    """With padding rows."""
    trained: bool = True
    """False if it is frozen."""

    @property
    def matrix(self) -> bool:
        """True if its gradient has rows and columns."""
        return len(self.placement.shape) > 1


@dataclass(frozen=True, kw_only=True)
class Training:
    """Which parameters of a prior are trained."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze: str = ""
    """As in StageConfig."""


ALL = Training()


def training_of(settings: PriorTrain) -> Training:
    """What a run trains."""
    return Training(lora=settings.lora, freeze=settings.freeze)


@lru_cache(maxsize=64)
def rank_layers(
    config: PriorConfig, rank: int, size: int, training: Training = ALL
) -> tuple[RankLayer, ...]:
    """All layers of a prior on one tensor rank.

    Blocks differ only in their masks' values, and in what is frozen.
    """
    built = _modules(config, rank, size, training.lora, False)
    layers = []
    for layer in prior_layers(config, 0, FakeTensorParallel(rank, size)):
        module = built[re.sub(r"\d", "", layer.name)]
        held = {
            n: Held(placement_of(p), p.numel(), _is_trained(p, f"{layer.name}.{n}", training))
            for n, p in module.named_parameters()
        }
        buffers = sum(b.numel() * b.element_size() for b in module.buffers())
        layers.append(RankLayer(name=layer.name, cost=layer.cost, parameters=held, buffers=buffers))
    return tuple(layers)


def _is_trained(parameter: nn.Parameter, name: str, training: Training) -> bool:
    known = placement_of(parameter).tied_to or name
    frozen = training.freeze and re.search(training.freeze, known)
    return parameter.requires_grad and not frozen


class _Undrawn(TorchFunctionMode):
    """Leaves weights as they are: drawing them on the meta device would import the compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


_DRAWS = ("normal_", "uniform_", "kaiming_uniform_")


@lru_cache(maxsize=16)
def _modules(
    config: PriorConfig, rank: int, size: int, lora: LoraConfig, sequence: bool
) -> dict[str, nn.Module]:
    shard = FakeTensorParallel(rank, size, sequence)
    with torch.device("meta"), _Undrawn():
        modules: dict[str, nn.Module] = {
            "embedding": PriorEmbedding(config, shard),
            "block": _ShapeBlock(config, 1, shard),
            "head": PriorHead(config, shard),
        }
        if lora.rank:
            for module in modules.values():
                attach(module, lora)
    return modules


def named(parts: Sequence[RankLayer]) -> dict[str, Held]:
    """Global parameter name -> parameter, sorted by name as engines do."""
    parameters: dict[str, Held] = {}
    for part in parts:
        for name, h in part.parameters.items():  # of a tied one, the first is no copy
            parameters.setdefault(h.placement.tied_to or f"{part.name}.{name}", h)
    return dict(sorted(parameters.items()))


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What autograd needs no gradients of, in a layer."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    frozen: frozenset[str] = frozenset()
    """Names of its frozen parameters."""
    input_too: bool = False
    """Nothing before the layer is trained, so that its input has no gradient either."""


NOTHING = Marks()


@dataclass(frozen=True, kw_only=True)
class Run:
    """How tensor ranks run a layer."""

    precision: str
    sequence: bool = False
    """Each holds a run of positions between the resblocks."""
    selective: bool = False
    """Outputs of matmuls are kept, the rest is recomputed."""
    cast: bool = False
    """Matrices of resblocks are in 16 bits before the layer runs."""


@lru_cache(maxsize=128)
def keeps_of(config: PriorConfig, size: int, run: Run, marks: Marks = NOTHING) -> Keeps:
    """Bytes that autograd saves of `embedding`, `block`, its two branches, `head` and `loss`.

    fp16 counts as bf16 in blocks, since both are 16 bits; under fp16 the head saves fp32. `marks`
    of one kind of layer are right for that kind alone.
    """
    one, two = (_kept(config, size, run, samples, marks) for samples in (1, 2))
    keeps = {name: (two[name] - one[name], 2 * one[name] - two[name]) for name in one}
    if run.selective:  # changes blocks alone
        keeps = keeps_of(config, size, replace(run, selective=False), marks) | keeps
    return keeps


def _kept(config: PriorConfig, size: int, run: Run, samples: int, marks: Marks) -> dict[str, int]:
    totals: dict[str, int] = {}
    modules = copy.deepcopy(_modules(config, 0, size, marks.lora, run.sequence))
    for module in modules.values():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in marks.frozen)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules.values():
            module.to_empty(device="cpu")
        block = modules["block"]
        assert isinstance(block, PriorBlock)
        for matrix in (p for p in block.parameters() if p.dim() > 1 and run.cast):
            type_ = torch.bfloat16 if run.precision != "fp32" else torch.float32
            matrix.data = matrix.data.to(type_)
        block.selective = run.selective
        positions = config.length // (size if run.sequence else 1)
        x = torch.empty(samples, positions, config.dim, requires_grad=not marks.input_too)
        text = torch.zeros(samples, config.text_length, dtype=torch.int64)
        batch = {
            "text": text,
            "image": torch.zeros(samples, config.image_length, dtype=torch.int64),
        }
        weights = [p for m in modules.values() for p in m.parameters()]
        outside = [*weights, *batch.values()]
        if config.positions == "rotary":
            head = config.dim // config.heads
            outside += rotary_table(config.text_length, config.grid, config.grid_columns, head)
        with torch.autocast("cpu", torch.bfloat16, enabled=run.precision != "fp32"):
            with noted(totals, "attention", outside):
                y = block._look_back(x)
            with noted(totals, "mlp", outside):
                block._transform(y)
        if not run.selective:
            _note_ends(totals, modules, batch, x, run.precision, outside)
    totals["block"] = totals["attention"] + totals["mlp"]
    return totals


def _note_ends(
    totals: dict[str, int],
    modules: dict[str, nn.Module],
    batch: dict[str, Tensor],
    x: Tensor,
    precision: str,
    outside: Sequence[Tensor],
) -> None:
    """Note what the embedding, the head and the loss keep."""
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"),
        noted(totals, "embedding", outside),
    ):
        modules["embedding"](batch)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        noted(totals, "head", outside),
    ):
        logits = modules["head"](x)
    with noted(totals, "loss", outside):
        prior_loss(logits, batch, 0.5)


@contextmanager
def noted(totals: dict[str, int], name: str, outside: Sequence[Tensor]) -> Iterator[None]:
    """Add up the storages that autograd saves, each once, except for those of `outside`."""
    before = {x.untyped_storage()._cdata for x in outside}
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        place = x.untyped_storage()._cdata
        if place not in before:
            kept[place] = x
        return x

    with watched(note, lambda x: x):
        yield
    totals[name] = sum(x.untyped_storage().nbytes() for x in kept.values())


def count_parameters(config: PriorConfig) -> int:
    """Parameters of the whole model, from its layers."""
    return sum(held.numel for held in named(rank_layers(config, 0, 1)).values())


def count_trained(settings: PriorTrain) -> int:
    """Parameters that a run trains; of adapters, they are what it saves."""
    held = named(rank_layers(settings.model, 0, 1, training_of(settings))).values()
    return sum(h.numel for h in held if h.trained)
