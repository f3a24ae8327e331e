"""DeepSpeed owns the step: ZeRO-1 over the data-parallel ranks."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from checkpoint.format import Reader, StateSlice, whole_box
from core.errors import ConfigError
from parallel.config import EngineConfig, OptimConfig
from parallel.engines.deepspeed_hooks import ensure_adam_state, fragments, initialize
from parallel.engines.protocol import (
    Batch,
    Losses,
    Program,
    StepResult,
    Whole,
    build_adamw,
)
from parallel.engines.results import mean_losses
from parallel.world import World

BUCKET = 2**20
"""Elements reduced together; ZeRO allocates this much, so it is small on CPUs."""


class DeepSpeedZeroEngine:
    """Weights on every rank, optimiser state sharded."""

    name = "deepspeed_zero"

    def __init__(
        self, program: Program, optim: OptimConfig, engine: EngineConfig, world: World
    ) -> None:
        """Raises: ConfigError on one process without a process group."""
        if world.group is None:
            raise ConfigError(
                "deepspeed_zero needs at least 2 ranks; use --engine.name reference on one process"
            )
        self._whole = Whole(program, engine.precision)
        self._names = self._whole.global_names()
        self._world = world
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": engine.accumulate,
            "gradient_clipping": optim.clip_norm,
            "zero_optimization": {
                "stage": engine.zero_stage,
                "overlap_comm": False,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
            },
            "steps_per_print": 2**31,
        }
        self._engine = initialize(self._whole, build_adamw(self._names, optim), config)

    def step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        seen = []
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        for batch in micro_batches:
            losses = self._engine(batch)
            self._engine.backward(losses["loss"])
            self._engine.step()
            seen.append({name: value.detach() for name, value in losses.items()})
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(losses=mean_losses(seen, self._world), grad_norm=norm)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        losses: Losses = self._whole(batch)
        return losses

    def state_slices(self) -> Iterator[StateSlice]:
        optimizer = self._engine.optimizer
        for name, parameter in self._names.items():
            shape = tuple(parameter.shape)
            for part in fragments(optimizer, parameter):
                inside = slice(part.offset, part.offset + part.stop - part.start)
                tensors = {
                    "master": part.master,
                    "exp_avg": part.state["exp_avg"][inside],
                    "exp_avg_sq": part.state["exp_avg_sq"][inside],
                }
                for kind, data in tensors.items():
                    yield StateSlice(
                        name=name,
                        kind=kind,
                        shape=shape,
                        box=whole_box(shape),
                        start=part.start,
                        data=data.detach().reshape(-1),
                    )
                if part.start == 0:
                    step = part.state["step"].reshape(1)
                    yield StateSlice(name=name, kind="step", shape=(), box=(), start=0, data=step)

    @torch.no_grad()
    def load_slices(self, reader: Reader) -> None:
        optimizer = self._engine.optimizer
        ensure_adam_state(optimizer)
        for name, parameter in self._names.items():
            master = reader.tensor(name, "master")
            parameter.copy_(master)
            for part in fragments(optimizer, parameter):
                wanted = slice(part.start, part.stop)
                inside = slice(part.offset, part.offset + part.stop - part.start)
                part.master.copy_(master.reshape(-1)[wanted])
                for kind in ("exp_avg", "exp_avg_sq"):
                    part.state[kind][inside] = reader.tensor(name, kind).reshape(-1)[wanted]
                part.state["step"].copy_(reader.tensor(name, "step"))

    def model(self) -> nn.ModuleDict:
        return self._whole.layers

    def memory(self) -> dict[str, int]:
        bytes_ = sum(p.numel() * p.element_size() for p in self._names.values())
        shards = 3 * bytes_ // self._world.size
        return {"parameters": bytes_, "gradients": bytes_, "optimizer": shards}

    def close(self) -> None:
        self._engine.destroy()
