"""One loop for dVAE, prior and CLIP, on any engine."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from checkpoint.format import MANIFEST
from checkpoint.reader import CheckpointReader
from checkpoint.writer import save_checkpoint
from core.errors import ConfigError, TapirError
from core.log import LOG, Meter, progress
from core.settings import to_json
from data_pipeline.stream import Stream, StreamState, first_records
from parallel.engines.catalogue import build_engine
from parallel.engines.protocol import Batch, Engine, EngineSettings, StepResult
from parallel.ledger import Ledger, total_bytes
from parallel.mesh import Mesh
from parallel.precision import choose_matmul_precision
from training.config import StageConfig
from training.export import model_is_whole, save_model
from training.run_folder import RunFolder
from training.schedules import learning_rate
from training.tasks import Task

Change = Callable[[Batch, int], Batch]
"""Changes a batch that begins at a record of this replica."""
EVALUATED_TOGETHER = 64
SKIPPED_IN_A_ROW = 10
"""So many updates with gradients that are not finite end a run."""
MAY_CHANGE = ("out", "data", "mesh", "engine", "compress", "bpe")
"""Settings that a resumed run may give anew."""
LOOP_MAY_CHANGE = ("log_every", "validate_every", "validation_samples", "save_every", "keep")


class Run:
    """A training run on this rank: task, engine, stream and folder."""

    def __init__(
        self, stage: str, task: Task[Any], settings: StageConfig, mesh: Mesh, ledger: Ledger
    ) -> None:
        self.stage, self.task, self.settings, self.mesh = stage, task, settings, mesh
        self.world = world = mesh.world
        self.precision = choose_matmul_precision(settings.engine.matmul_precision)
        config = {"stage": stage, **to_json(settings), "model": to_json(task.model_config)}
        self.config = config
        self.folder = RunFolder(settings.out, config, writes=world.rank == 0)
        parts = EngineSettings(
            optim=settings.optim,
            engine=settings.engine,
            compress=settings.compress,
            seed=settings.loop.seed,
        )
        self.engine: Engine = build_engine(task.program, parts, mesh)
        self.stream = Stream(
            task.train,
            seed=settings.loop.seed,
            batch=settings.loop.batch,
            order=settings.order,
            rank=mesh.data.rank,
            ranks=mesh.data.size,
            reads=mesh.needs_data,
        )
        self.step = 0
        self.skipped = 0
        self._ledger = ledger

    def train(self) -> None:
        """Train until loop.steps, from the newest checkpoint if there is one."""
        self._resume()
        self.folder.begin(self.step)
        loop = self.settings.loop
        if self.step == loop.steps:
            LOG.info("%s has all %d steps already", self.settings.out, loop.steps)
        with progress(f"train {self.stage}", loop.steps, self.world.rank == 0) as meter:
            for result, seconds in self.steps():
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
        records = self._held_out()
        mine = records[self.mesh.data.rank :: self.mesh.data.size]
        row = self._means(mine)
        figures, pictures = self.task.figures(self._means, mine, records)
        row.update(figures)
        for name, image in pictures.items():
            self.folder.picture(name, image, self.step)
        self.folder.log({"step": self.step, "split": "validation", **row})
        LOG.info("validation at %d: %s", self.step, _figures(row))
        self.world.barrier()
        return row

    def _held_out(self) -> list[Any]:
        """The held-out records: as many as give every replica of any mesh equal parts."""
        wanted = self.settings.loop.validation_samples
        records = first_records(self.task.held_out, wanted)
        lanes = self.settings.order.lanes
        if len(records) < lanes:
            raise ConfigError(
                f"the validation split has {len(records)} samples, order.lanes={lanes} needs as "
                "many at least; pack with a larger --validation, or lower order.lanes"
            )
        return records[: len(records) - len(records) % lanes]

    def _means(self, records: Sequence[Any], change: Change | None = None) -> dict[str, float]:
        """Mean losses over this replica's records and all replicas; every rank must call it."""
        totals: dict[str, float] = {}
        for start in range(0, len(records), EVALUATED_TOGETHER):
            part = records[start : start + EVALUATED_TOGETHER]
            batch = self.task.batch(part, self.step)
            losses = self.engine.evaluate(change(batch, start) if change else batch)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(part)
        names = sorted(totals)
        sums = torch.tensor([totals[name] / len(records) for name in names]).double()
        return dict(zip(names, self.world.mean(sums).tolist(), strict=True))

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

    def steps(self) -> Iterator[tuple[StepResult, float]]:
        """The training steps that are left, with their durations."""
        settings = self.settings
        began = time.perf_counter()
        batches = iter(self.stream)
        while self.step < settings.loop.steps:
            records, _ = next(batches)
            parts = _split(records, settings.engine.accumulate)
            micro = [self.task.batch(part, self.step) if part else {} for part in parts]
            lr = learning_rate(settings.optim, self.step, settings.loop.steps)
            self._ledger.take()
            result = self.engine.step(micro, lr)
            self.step += 1
            result.facts["lr"] = lr
            self._count_skipped(result)
            now = time.perf_counter()
            yield result, now - began
            began = time.perf_counter()

    def _report(self, result: StepResult, seconds: float, meter: Meter) -> None:
        loop, counts = self.settings.loop, self._ledger.take()
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
                "comm_bytes": total_bytes(counts),
                "comm": counts,
            }
            self.folder.log(row)

    def _count_skipped(self, result: StepResult) -> None:
        """All ranks skip an update together when a gradient anywhere is not finite."""
        if math.isfinite(result.grad_norm):
            self.skipped = 0
            return
        self.skipped += 1
        LOG.warning("step %d: a gradient is not finite; the update is skipped", self.step)
        if self.skipped == SKIPPED_IN_A_ROW:
            raise TapirError(
                f"step {self.step}: {self.skipped} updates in a row had gradients that are not "
                f"finite (loss {result.losses['loss']}); the last checkpoint is whole: lower "
                "optim.lr and start again"
            )

    def _resume(self) -> None:
        reader = self.folder.newest()
        if reader is None:
            return
        _refuse_other_config(reader, self.config)
        self.resume_from(reader)
        LOG.info("resumed from %s", reader.folder)

    def resume_from(self, reader: CheckpointReader) -> None:
        """Take weights, moments and the position of the data from a checkpoint.

        Raises: ConfigError if it holds another model or other data.
        """
        _refuse_other_shapes(reader, self.engine)
        self.engine.load_slices(reader)
        state = StreamState(**reader.facts["stream"])
        self.stream.resume(state)
        self.step = int(reader.facts["step"])

    def _finish(self) -> None:
        last = self.folder.step_folder(self.step)
        whole = self.world.rank == 0 and model_is_whole(self.settings.out, self.stage)
        if any(self.world.gather_text("yes" if whole else "")) and (last / MANIFEST).exists():
            return
        row = self.validate()
        self.save()
        if self.world.rank == 0:
            facts = {**self.task.facts(), "step": self.step, "validation": row}
            facts["precision"] = self.precision
            model = to_json(self.task.model_config)
            reader = CheckpointReader(self.folder.step_folder(self.step))
            save_model(self.settings.out, self.stage, model, facts, reader)
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
    stored, mine = reader.shapes(), engine.shapes()
    wrong = sorted(set(mine.items()) - set(stored.items()))[:3]
    if wrong:
        raise ConfigError(f"{reader.folder} holds other tensors than this model: {wrong} ...")
