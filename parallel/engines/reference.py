"""Plain torch, single-process or data-parallel: the reference of every equality test.

Gradients are reduced as one flat fp32 tensor in name order. torch's DDP reorders its buckets after
the first step, which changes rounding on more than two ranks: a resumed run would not be bitwise
equal to an uninterrupted one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from checkpoint.format import KINDS, Reader, StateSlice
from parallel.control import Vote
from parallel.engines.frozen import trained
from parallel.engines.modules import (
    build_compressor,
    decide_update,
    load_scales,
    mean_losses,
    placements,
    scale_slices,
)
from parallel.engines.protocol import (
    Batch,
    EngineSettings,
    Losses,
    Program,
    StepResult,
    Whole,
    build_adamw,
    scales_of,
)
from parallel.mesh import Group, Mesh
from parallel.replicas import copy_parts, flat_average


class ReferenceEngine:
    """The whole model on every rank."""

    name = "reference"

    def __init__(self, program: Program, settings: EngineSettings, mesh: Mesh) -> None:
        device = mesh.world.device
        self._whole = Whole(program, settings.engine, device)
        self._losses = program.losses
        self._names = self._whole.stage.global_names()
        self._trained = trained(self._names)
        self._saved = self._names if program.saves_frozen else self._trained
        self._places = placements(self._names)
        self._optimizer = build_adamw(self._names, settings.optim)
        self._scales = scales_of(program, self._whole.stage.scales, settings.engine)
        self._clip_norm, self._mesh = settings.optim.clip_norm, mesh
        self._judge = settings.judge
        held = placements(self._trained)
        self._compressor = build_compressor(program, held, settings, mesh.data, Group(), device)

    def step(
        self, micro_batches: Sequence[Batch], lr: float, wants_stop: bool = False
    ) -> StepResult:
        self._optimizer.zero_grad(set_to_none=True)
        losses = [self._backward(batch, len(micro_batches)) for batch in micro_batches]
        squares, facts = self._reduce()
        vote = Vote(losses=losses, wants_stop=wants_stop)
        decision = decide_update(squares, self._mesh, self._scales, vote, self._judge)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if not decision.skipped:
            self._clip(decision.norm)
            self._optimizer.step()
        return StepResult(
            losses=mean_losses(losses, self._losses, self._mesh),
            grad_norm=decision.norm,
            skipped=decision.skipped,
            stopping=decision.stopping,
            facts={**facts, **self._scales.facts()},
        )

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        losses: Losses = self._whole(batch)
        return losses

    def state_slices(self) -> Iterator[StateSlice]:
        yield from scale_slices(self._scales, self._mesh)
        if self._mesh.world.rank > 0:
            return
        for name, parameter in self._saved.items():
            tensors = {"master": parameter, **self._optimizer.state.get(parameter, {})}
            for kind in KINDS:
                if kind == "step" and kind in tensors:
                    data = tensors[kind].reshape(1)
                    yield StateSlice(name=name, kind=kind, shape=(), start=0, data=data)
                elif kind in tensors:
                    part = self._places[name].slice(name, kind, 0, tensors[kind])
                    if part is not None:
                        yield part

    def error_slices(self) -> Iterator[StateSlice]:
        if self._compressor is not None:
            yield from self._compressor.slices()

    @torch.no_grad()
    def load_slices(self, reader: Reader) -> None:
        for name, parameter in self._saved.items():
            parameter.copy_(reader.tensor(name, "master"))
            if name not in self._trained:
                continue
            state = self._optimizer.first_state(parameter)
            for kind, tensor in state.items():
                tensor.copy_(reader.tensor(name, kind))
            self._optimizer.state[parameter] = state
        load_scales(self._scales, reader)
        if self._compressor is not None:
            self._compressor.load(reader)

    @torch.no_grad()
    def load_frozen(self, reader: Reader) -> None:
        for name in self.frozen():
            self._names[name].copy_(reader.tensor(name, "master"))

    def frozen(self) -> frozenset[str]:
        return frozenset(self._names.keys() - self._trained.keys())

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        return [(list(self._names.values()), self._mesh.data)]

    def layers(self) -> dict[str, nn.Module]:
        return dict(self._whole.stage.layers.items())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._places[name].shape for name in self._saved}

    def memory(self) -> dict[str, int]:
        whole, bytes_ = (
            sum(p.numel() * p.element_size() for p in held.values())
            for held in (self._names, self._trained)
        )
        return {"parameters": whole, "gradients": bytes_, "optimizer": 2 * bytes_}

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, micro_batches: int) -> Losses:
        """Accumulate the gradients of one of `micro_batches`; returns its losses."""
        losses: Losses = self._whole(batch)
        (losses["loss"] / micro_batches).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _reduce(self) -> tuple[list[Tensor], dict[str, float]]:
        """Average gradients over the replicas.

        Returns this rank's share of their squares, and the metrics of compression.
        """
        gradients = {n: p.grad for n, p in self._names.items() if p.grad is not None}
        size = self._mesh.data.size
        if self._compressor is not None:
            squares, reduced = self._compressor.average(gradients)
            return squares, self._compressor.facts([reduced])
        tensors = list(gradients.values())
        if size > 1:
            copy_parts(flat_average(tensors, self._mesh.data.handle, size), tensors)
        norms = torch.stack(torch._foreach_norm(tensors))
        return [norms.double().square().sum() / size], {}

    def _clip(self, norm: float) -> None:
        if norm + 1e-6 > self._clip_norm:
            gradients = [p.grad for p in self._names.values() if p.grad is not None]
            torch._foreach_mul_(gradients, self._clip_norm / (norm + 1e-6))
