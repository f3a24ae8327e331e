"""Engines on fake CUDA tensors: shapes and devices without values, and without a GPU.

FakeTensorMode refuses two devices in one operation, as CUDA does, and gives every result the
device that the real kernel would give it. Only 0-dim tensors escape this check.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import models.dvae
import models.initialization
import models.prior
from models.attention.banded import band_of
from models.clip import Clip
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.prior import prior_program
from parallel.compress.powersgd import MatrixShard
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.control import Vote, accept_all
from parallel.engines import protocol
from parallel.engines.modules import Compressor, decide_update, mean_losses
from parallel.engines.protocol import Batch, EngineSettings, Program
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Group, Mesh
from parallel.placement import Placement, place
from parallel.scales import Scales
from parallel.world import World
from training.tasks.clip import clip_program
from training.tasks.dvae_program import dvae_program

_aten = torch.ops.aten
Module = TypeVar("Module")
CUDA = torch.device("cuda", 0)
MESH = Mesh(world=World(device=CUDA))
PRIOR = PriorConfig(
    dim=128, heads=2, layers=4, text_length=8, grid=4, text_vocabulary=32, image_vocabulary=16
)
SETTINGS = EngineSettings(
    optim=OptimConfig(), engine=EngineConfig(precision="bf16"), compress=CompressConfig(), seed=0
)
DRAWN = DVAEConfig(pixels=32, codebook=16)
RANKED = ClipConfig(text_vocabulary=32)


class _Read(TorchDispatchMode):
    """Reads of fake tensors return true or 1; results of `any` return false."""

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), named: Any = None) -> Any:
        if call is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].dtype == torch.bool:
                return not hasattr(args[0], "of_any")
            return 1.0 if args[0].dtype.is_floating_point else 1
        result = call(*args, **(named or {}))
        if call is _aten.any.default:
            result.of_any = True
        return result


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make all tensors fake, except for keyed draws and attention's kernels."""
    monkeypatch.setattr(models.initialization, "_runs", lambda *_: ())
    noise = lambda keys, shape: torch.ones(len(keys), *shape, device=keys.device)  # noqa: E731
    monkeypatch.setattr(models.dvae, "gumbel_noise", noise)
    monkeypatch.setattr(models.prior, "flexible_attention", lambda q, k, v, *_: q + k + v)
    monkeypatch.setattr(protocol, "move", _moved)
    if not torch.cuda.is_available():  # calls that need a driver
        monkeypatch.setattr(Tensor, "backward", _backward)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for kind in ("row", "column", "conv"):
        band_of(kind, PRIOR.text_length, PRIOR.grid, PRIOR.conv_kernel)  # cached, with real tensors
    with FakeTensorMode(allow_non_fake_inputs=True), _Read():
        yield


def _backward(loss: Tensor) -> None:
    """Gradients for all leaves of a loss; autograd's engine needs a driver."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left.extend(before for before, _ in node.next_functions)
        if (leaf := getattr(node, "variable", None)) is not None:
            assert leaf.device == CUDA
            leaf.grad = torch.zeros_like(leaf)


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    """`placement.move` for fake tensors, whose data torch cannot swap."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                shape, strides, dtype = weight.shape, weight.stride(), weight.dtype
                there = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                part._parameters[name] = moved = nn.Parameter(there)
                if (placement := getattr(weight, "tapir_placement", None)) is not None:
                    place(moved, placement)
    return module


def _tokens(device: torch.device = CUDA) -> Batch:
    shapes = {"text": (2, PRIOR.text_length), "image": (2, PRIOR.grid**2)}
    return {n: torch.zeros(s, dtype=torch.int64, device=device) for n, s in shapes.items()}


def _pictures() -> Batch:
    shapes = {"pixels": (2, 3, DRAWN.pixels, DRAWN.pixels), "tau": (), "beta": ()}
    batch = {name: torch.ones(shape, device=CUDA) for name, shape in shapes.items()}
    return {**batch, "keys": torch.zeros(2, dtype=torch.int64, device=CUDA)}


def _pairs() -> Batch:
    text = torch.zeros(2, RANKED.text_length, dtype=torch.int64, device=CUDA)
    return {"text": text, "pixels": torch.ones(2, 3, RANKED.pixels, RANKED.pixels, device=CUDA)}


STAGES: dict[str, tuple[Callable[[], Program], Callable[[], Batch]]] = {
    "prior": (lambda: prior_program(PRIOR, 0), _tokens),
    "dvae": (lambda: dvae_program(_real(lambda: DVAE(DRAWN)), DRAWN), _pictures),
    "clip": (lambda: clip_program(_real(lambda: Clip(RANKED)), MESH.world), _pairs),
}


def _real(build: Callable[[], Module]) -> Module:
    """A module that cannot be built with fake tensors."""
    with unset_fake_temporarily():
        return build()


def _engine(stage: str = "prior", **changed: Any) -> ReferenceEngine:
    return ReferenceEngine(STAGES[stage][0](), replace(SETTINGS, **changed), MESH)


def _gradients(engine: ReferenceEngine) -> None:
    for weight in engine._names.values():
        weight.grad = torch.zeros_like(weight)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_its_first_step_and_is_evaluated(stage: str, precision: str) -> None:
    engine = _engine(stage, engine=EngineConfig(precision=precision))
    assert {weight.device for weight in engine._names.values()} == {CUDA}
    batch = STAGES[stage][1]()
    assert math.isfinite(engine.step([batch, batch], 1e-3).grad_norm)
    losses = engine.evaluate(batch)
    assert losses.keys() == set(STAGES[stage][0]().losses)
    assert {loss.device for loss in losses.values()} == {CUDA}


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(max_variance=5.0),
        OptimConfig(moments="bf16", beta2=0.96),
        OptimConfig(moments="bf16", beta2=0.96, max_variance=5.0),
    ],
)
def test_every_optimizer_takes_its_first_step(optim: OptimConfig) -> None:
    engine = _engine(optim=optim)
    assert math.isfinite(engine.step([_tokens()], 1e-3).grad_norm)


def test_compressed_gradients_take_their_first_step() -> None:
    engine = _engine(compress=CompressConfig(rank=2))
    assert engine.step([_tokens()], 1e-3).facts["compress_rank"] == 2


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_resumed_state_is_on_the_device_of_the_weights(moments: str) -> None:
    """torch's fused AdamW needs moments and count on the GPU; AdamW16 its count on the CPU."""
    engine = _engine(optim=OptimConfig(moments=moments, beta2=0.96))

    class Stored:
        def kinds(self, _name: str) -> list[str]:
            return ["master", "exp_avg", "exp_avg_sq", "step"]

        def tensor(self, name: str, kind: str) -> Tensor:
            shape = () if kind == "step" else engine._names[name].shape
            return torch.zeros(shape, device="cpu")

    engine.load_slices(Stored())  # type: ignore[arg-type]
    for weight in engine._names.values():
        state = engine._optimizer.state[weight]
        assert {weight.device, state["exp_avg"].device, state["exp_avg_sq"].device} == {CUDA}
        assert state["step"].device == (CUDA if moments == "fp32" else torch.device("cpu"))
    _gradients(engine)
    engine._optimizer.step()


def test_losses_are_averaged_on_their_device() -> None:
    losses = {"loss": torch.zeros((), device=CUDA)}
    assert mean_losses([losses, losses], ("loss",), MESH) == {"loss": 1.0}


def test_the_norm_is_decided_from_the_tensors_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors let 0-dim tensors of two devices be stacked; CUDA does not."""
    stack = torch.stack

    def strict(tensors: list[Tensor], *more: Any, **named: Any) -> Tensor:
        assert len({tensor.device for tensor in tensors}) == 1, "stacked over two devices"
        return stack(tensors, *more, **named)

    monkeypatch.setattr(torch, "stack", strict)
    vote = Vote(losses=[{"loss": torch.zeros((), device=CUDA)}])
    squares = [torch.zeros((), device=CUDA)]
    decision = decide_update(squares, MESH, Scales([], {}), vote, accept_all)
    assert decision.clipped_by == 1.0


def test_gradients_are_compressed_on_their_device() -> None:
    place = Placement(shape=(8, 8), first=0, rows=8, split=False)
    shards = [MatrixShard(name="a", rows=8, columns=8)]
    compressor = Compressor({"a": place}, shards, 2, SETTINGS, Group(), Group(), CUDA)
    gradients = {"a": torch.zeros(8, 8, device=CUDA), "bias": torch.zeros(8, device=CUDA)}
    reduced = compressor.reduce(gradients)
    there = [*reduced.gradients.values(), *reduced.squares.values()]
    assert {tensor.device for tensor in there} == {CUDA}


def test_two_devices_in_one_operation_are_refused() -> None:
    """The assumption of these tests."""
    with pytest.raises(RuntimeError, match="device"):
        _engine().step([_tokens(torch.device("cpu"))], 1e-3)
