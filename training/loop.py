"""One loop for dVAE, prior and CLIP, on any engine."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from checkpoint.reader import CheckpointReader
from checkpoint.writer import save_checkpoint
from core.errors import ConfigError, TapirError
from core.log import LOG, Meter, progress
from core.settings import to_json
from data_pipeline.stream import Stream, StreamState, first_records
from parallel.engines.catalogue import build_engine
from parallel.engines.protocol import Engine, StepResult
from parallel.precision import choose_matmul_precision
from parallel.world import World
from training.config import StageConfig
from training.export import save_model
from training.run_folder import RunFolder
from training.schedules import learning_rate
from training.tasks import Task

MAY_CHANGE = ("out", "data", "mesh", "engine", "bpe")
"""Settings that a resumed run may give anew."""
LOOP_MAY_CHANGE = ("log_every", "validate_every", "validation_samples", "save_every", "keep")


class Run:
    """A training run on this rank: task, engine, stream and folder."""

    def __init__(self, stage: str, task: Task[Any], settings: StageConfig, world: World) -> None:
        self.stage, self.task, self.settings, self.world = stage, task, settings, world
        self.precision = choose_matmul_precision(settings.engine.matmul_precision)
        config = {"stage": stage, **to_json(settings), "model": to_json(task.model_config)}
        self.config = config
        self.folder = RunFolder(settings.out, config, writes=world.rank == 0)
        self.engine: Engine = build_engine(task.program, settings.optim, settings.engine, world)
        self.stream = Stream(
            task.train,
            seed=settings.loop.seed,
            batch=settings.loop.batch,
            order=settings.order,
            rank=world.rank,
            ranks=world.size,
        )
        self.step = 0

    def train(self) -> None:
        """Train until loop.steps, from the newest checkpoint if there is one."""
        self._resume()
        self.folder.begin(self.step)
        loop = self.settings.loop
        if self.step == loop.steps:
            LOG.info("%s has all %d steps already", self.settings.out, loop.steps)
        with progress(f"train {self.stage}", loop.steps, self.world.rank == 0) as meter:
            for result, seconds in self._steps():
                self._report(result, seconds, meter)
                if (
                    loop.validate_every
                    and self.step % loop.validate_every == 0 < loop.steps - self.step
                ):
                    self.validate()
                if self.step % loop.save_every == 0 and self.step < loop.steps:
                    self.save()
        self._finish()

    def validate(self) -> dict[str, float]:
        """Mean losses over held-out samples, logged as a row of split `validation`."""
        records = first_records(
            self.task.held_out,
            self.settings.loop.validation_samples,
            self.world.rank,
            self.world.size,
        )
        totals: dict[str, float] = {}
        size = 64
        for start in range(0, len(records), size):
            part = records[start : start + size]
            for name, value in self.engine.evaluate(self.task.batch(part, self.step)).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(part)
        names = sorted(totals)
        sums = torch.tensor([*(totals[name] for name in names), float(len(records))]).double()
        means = self.world.mean(sums)
        row = {name: float(value / means[-1]) for name, value in zip(names, means, strict=False)}
        if self.world.rank == 0:
            every = first_records(self.task.held_out, self.settings.loop.validation_samples)
            figures, pictures = self.task.figures(self.engine, every)
            row.update(figures)
            for name, image in pictures.items():
                self.folder.picture(name, image, self.step)
        self.folder.log({"step": self.step, "split": "validation", **row})
        LOG.info("validation at %d: %s", self.step, _figures(row))
        self.world.barrier()
        return row

    def save(self) -> None:
        """Write a checkpoint, then delete those beyond loop.keep.

        Raises: OSError if the disk is full; older checkpoints stay whole.
        """
        facts = {
            "stage": self.stage,
            "step": self.step,
            "stream": dataclasses.asdict(self.stream.state),
            "config": self.config,
        }
        folder = self.folder.step_folder(self.step)
        slices = self.engine.state_slices()
        save_checkpoint(folder, slices, facts, self.world.rank, self.world.gather_text)
        self.folder.prune(self.settings.loop.keep)
        self.world.barrier()

    def close(self) -> None:
        """Let go of the folder and the engine."""
        self.folder.close()
        self.engine.close()

    def _steps(self) -> Iterator[tuple[StepResult, float]]:
        """The training steps that are left, with their durations."""
        settings = self.settings
        began = time.perf_counter()
        batches = iter(self.stream)
        while self.step < settings.loop.steps:
            records, _ = next(batches)
            micro = [
                self.task.batch(part, self.step)
                for part in _split(records, settings.engine.accumulate)
            ]
            lr = learning_rate(settings.optim, self.step, settings.loop.steps)
            result = self.engine.step(micro, lr)
            self.step += 1
            result.facts["lr"] = lr
            self._stop_if_broken(result)
            now = time.perf_counter()
            yield result, now - began
            began = time.perf_counter()

    def _report(self, result: StepResult, seconds: float, meter: Meter) -> None:
        loop = self.settings.loop
        rate = loop.batch * self.task.units / seconds
        meter.update(self.step, f"loss {result.losses['loss']:.4f}, {rate:,.0f} tokens/s")
        if self.step % loop.log_every == 0 or self.step == loop.steps:
            row = {
                "step": self.step,
                "epoch": self.stream.state.epoch,
                **result.losses,
                "grad_norm": result.grad_norm,
                **result.facts,
                "tokens_per_second": rate,
                "seconds": seconds,
            }
            self.folder.log(row)

    def _stop_if_broken(self, result: StepResult) -> None:
        numbers = torch.tensor([result.losses["loss"], result.grad_norm])
        if not bool(torch.isfinite(numbers).all()):
            raise TapirError(
                f"step {self.step}: loss {result.losses['loss']} and gradient norm "
                f"{result.grad_norm}; the last checkpoint is whole: lower optim.lr and start again"
            )

    def _resume(self) -> None:
        reader = self.folder.newest()
        if reader is None:
            return
        _refuse_other_config(reader, self.config)
        _refuse_other_shapes(reader, self.engine)
        self.engine.load_slices(reader)
        state = StreamState(**reader.facts["stream"])
        self.stream.resume(state)
        self.step = int(reader.facts["step"])
        LOG.info("resumed from %s", reader.folder)

    def _finish(self) -> None:
        target = self.settings.out / "model.json"
        last = self.folder.step_folder(self.step)
        if target.exists() and (last / "manifest.json").exists():
            return
        row = self.validate()
        self.save()
        if self.world.rank == 0:
            facts = {**self.task.facts(), "step": self.step, "validation": row}
            facts["precision"] = self.precision
            model = to_json(self.task.model_config)
            save_model(self.settings.out, self.stage, model, facts, self.engine.model())
        self.world.barrier()


def _split(records: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    size = len(records) // parts
    return [records[i * size : (i + 1) * size] for i in range(parts)]


def _figures(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(row.items()))


def _refuse_other_config(reader: CheckpointReader, config: dict[str, Any]) -> None:
    before, now = _fixed(reader.facts["config"]), _fixed(config)
    rows = [
        f"{name}: {before.get(name)} in the checkpoint, {now.get(name)} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if rows:
        raise ConfigError(
            f"{reader.folder} was written with other settings; give the same ones, or another "
            "--out:\n" + "\n".join(f"- {row}" for row in rows)
        )


def _fixed(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All settings that a resumed run must keep, as dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if (not prefix and name in MAY_CHANGE) or (prefix == "loop." and name in LOOP_MAY_CHANGE):
            continue
        if isinstance(value, dict):
            found.update(_fixed(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def _refuse_other_shapes(reader: CheckpointReader, engine: Engine) -> None:
    mine = {name: tuple(p.shape) for name, p in engine.model().named_parameters()}
    if reader.shapes() != mine:
        wrong = sorted(set(reader.shapes().items()) ^ set(mine.items()))[:3]
        raise ConfigError(f"{reader.folder} holds other tensors than this model: {wrong} ...")
