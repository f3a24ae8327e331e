"""The training loop of the dVAE, prior and CLIP, on any engine."""

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from checkpoint.format import StateSlice
from checkpoint.reader import CheckpointReader
from core.config import to_json
from core.errors import Preempted
from core.files.atomic import Json
from core.heartbeat import Heart
from core.log import LOG, Meter, progress
from core.stop import stop_asked
from core.storage.store import open_store
from data_pipeline.streaming.mixture import Batches, epochs_of, open_stream
from data_pipeline.streaming.state import Position, position_of
from models.counts import step_flops
from parallel.engines.frozen import check_frozen, freeze
from parallel.engines.protocol import Batch, Engine, EngineSettings, StepResult
from parallel.engines.registry import build_engine
from parallel.ledger import Ledger
from parallel.mesh import Mesh
from parallel.precision import engine_numerics
from training.config import StageConfig
from training.ema import Average
from training.export.save import FinishedModel, Writers, remove_other_model, save_model
from training.export.weights import model_is_whole
from training.initial.start import Start
from training.profiling.categories import CHECKPOINT, COMPUTE, DATA_WAIT, VALIDATION
from training.profiling.profile import Profile, timed
from training.recovery.rewind import Recovery, checkpoints_of_capsules
from training.run.alarms import Alarms
from training.run.checkpoints import Checkpoints, save_surely
from training.run.feed import Feed
from training.run.folder import RunFolder
from training.run.log import RunLog, StepCost
from training.run.resume import accept_config, refuse_changes, refuse_misfits, tell_differences
from training.run.versions import DataVersions
from training.schedules import Plateau, learning_rate
from training.tasks.task import Task
from training.validation import Validation


class Run:
    """A training run on this rank: task, engine, stream, folder and checkpoints."""

    def __init__(
        self,
        stage: str,
        task: Task[Any],
        settings: StageConfig,
        mesh: Mesh,
        ledger: Ledger,
        heart: Heart,
    ) -> None:
        self.stage, self.task, self.settings, self.mesh = stage, task, settings, mesh
        self.world = world = mesh.world
        self._ledger, self._heart = ledger, heart
        heart.beat("start")
        self.numerics = engine_numerics(world.device, settings.engine)
        self.config = {"stage": stage, **to_json(settings), "model": to_json(task.model_config)}
        self.folder = RunFolder(settings.out, self.config, world.rank == 0, settings.track)
        self.recovery = Recovery(settings.guard, mesh, settings.out)
        stream = _stream(task, settings, mesh)  # before the engine: it rejects too little data
        self._versions = DataVersions(task, settings.data, mesh)
        self.feed = Feed(task, stream, settings, world.device, self._versions)
        self._start = Start(stage, task, settings, world)
        program = freeze(task.program, settings.freeze)
        check_frozen(program, settings.freeze, mesh.pipeline.size)
        self.engine: Engine = build_engine(program, self._engine_settings(), mesh)
        self.average = Average(self.engine, settings.optim, world.device)
        self.plateau = Plateau()
        self.checkpoints = Checkpoints(
            open_store(settings.checkpoint.to or str(settings.out / "checkpoints")),
            settings.checkpoint,
            world.rank,
            world.size,
            (world.gather_text, world.gather_aside),
        )
        self._validation = Validation(task, self.engine, settings, mesh, heart)
        flops = step_flops(task.model_config, settings.loop.global_batch_size)
        precision = settings.engine.precision
        self.profile = Profile(settings.profile, mesh, ledger, settings.out, flops, precision)
        self.alarms = Alarms(settings, mesh, self.engine.shapes().values())
        self.log = RunLog(settings, task.units, self.folder, self.profile)
        self.step = 0
        self.history: list[Json] = []
        """What happened to the run: weights it started from, settings changed on purpose."""
        self._resumed_at: int | None = None
        self._scored: tuple[int, float] | None = None
        """(step, loss) of the last validation."""

    def train(self) -> None:
        """Train to loop.steps or loop.stop_at, from the newest checkpoint if there is one.

        Raises: Preempted after a checkpoint, if the process received a stop request.
        """
        self._resume()
        self._note_version()
        self.folder.begin(self.step)
        self.profile.open(self.step)
        self.alarms.disk(self.checkpoints.store, self.step)
        loop = self.settings.loop
        if self.step >= loop.end:
            share = "all" if self.step >= loop.steps else f"{self.step} of"
            LOG.info("%s has %s %d steps already", self.settings.out, share, loop.steps)
        with progress(f"train {self.stage}", loop.steps, self.world.rank == 0) as meter:
            for result, cost in self.steps():
                self.report(result, cost, meter)
                left = loop.end - self.step
                if loop.validate_every and self.step % loop.validate_every == 0 < left:
                    self.validate()
                if left and (result.stopping or self._is_save_due()):
                    self.save()
                if left and result.stopping:
                    self.checkpoints.saver.wait()
                    raise Preempted(f"stopped after step {self.step} with a checkpoint saved")
        if self.step >= loop.steps:
            self._finish()
        elif self._resumed_at != self.step:
            self._save_surely()
            LOG.info("saved at step %d of %d, where --loop.stop-at ends", self.step, loop.steps)

    def steps(self) -> Iterator[tuple[StepResult, StepCost]]:
        """Do the remaining training steps; yields each result with its cost."""
        began = time.perf_counter()
        batches = self.feed.steps(self.step)
        while self.step < self.settings.loop.end:
            self.profile.begin(self.step + 1)
            asked = time.perf_counter()
            with self.profile.phase(DATA_WAIT):
                data = next(batches)
            waited = time.perf_counter() - asked
            with self._ledger.counted() as traffic:
                result = self.one_step(data.micro)
                facts = self._facts_of_step(data.state)
                back = self.recovery.must_rewind(result, data.records, data.state, facts)
                if not back:
                    self.average.update(self.step)
                    if self.recovery.due(self.step):
                        self.recovery.compare_replicas(self.engine, self.step)
            if back:
                self._rewind()
                batches = self.feed.steps(self.step)
                continue
            spent = time.perf_counter() - began
            yield result, StepCost(seconds=spent, waited=waited, traffic=traffic)
            began = time.perf_counter()

    def one_step(self, micro: list[Batch]) -> StepResult:
        """Do one update with this replica's micro-batches; a skipped update counts as a step."""
        settings, halved = self.settings, self.plateau.halved
        lr = learning_rate(settings.optim, self.step, settings.loop.steps, halved)
        with self.profile.phase(COMPUTE):
            result = self.engine.step(micro, lr, wants_stop=stop_asked())
        self.step += 1
        self._heart.beat("step", self.step)
        return replace(result, facts={**result.facts, "lr": lr})

    def report(self, result: StepResult, cost: StepCost, meter: Meter) -> None:
        """Log a step, and check the alarms."""
        self._note_failure()
        self._note_version()
        self.alarms.pace(self.step, cost.seconds)
        self.log.step(self.step, epochs_of(self.feed.state, self.task.train), result, cost, meter)

    @timed(VALIDATION)
    def validate(self) -> dict[str, float]:
        """Evaluate held-out samples, and log the means as a row of split `validation`."""
        row, pictures = self._validation.run(self.step)
        self._scored = self.step, row["loss"]
        if self.plateau.observe(self.settings.optim, self.step, row["loss"]):
            LOG.info("the validation loss is level: learning rate halved at step %d", self.step)
        self.log.validation(self.step, row, pictures)
        self.alarms.codes(row, self.step)
        self.world.barrier()
        return row

    @timed(CHECKPOINT)
    def save(self) -> None:
        """Write a checkpoint, in the background unless configured otherwise.

        Raises: TapirError if the replicas differ; a corrupt state is never saved.
        """
        self._heart.beat("save")
        self.recovery.compare_replicas(self.engine, self.step)
        facts = {
            "stage": self.stage,
            "step": self.step,
            "stream": asdict(self.feed.state),
            "guard": self.recovery.guard.state(),
            "plateau": self.plateau.state(),
            "validation_loss": self._loss_now(),
            "config": self.config,
            "task": {**self.task.facts(), **self._start.facts},
            "numerics": to_json(self.numerics),
            "history": self.history,
        }
        self.checkpoints.saver.settle()
        self._note_failure()
        self.alarms.disk(self.checkpoints.store, self.step)
        if self.world.rank == 0:
            self.checkpoints.protected = checkpoints_of_capsules(self.settings.out)
        held_up = self.checkpoints.save(self.step, self._slices(), facts)
        self.log.note("save_held_up_seconds", held_up)

    def resume_from(self, reader: CheckpointReader) -> None:
        """Load weights, moments and the data position from a checkpoint.

        Raises: ConfigError if it holds another model or other data.
        """
        self._heart.beat("load")
        refuse_misfits(reader, self.engine.shapes(), self.engine.frozen())
        self._start.load_base(self.engine, reader)
        self.engine.load_slices(reader)
        self.average.load(reader)
        self.feed.resume(position_of(reader.facts["stream"]))
        self.recovery.guard.load(reader.facts.get("guard", {}))
        self.plateau.load(reader.facts.get("plateau", {}))
        self.step = self._resumed_at = int(reader.facts["step"])

    def close(self) -> None:
        """Close the feed, the profile, the run folder and the engine."""
        self.feed.close()
        self.profile.close()
        self.folder.close()
        self.engine.close()

    def _is_save_due(self) -> bool:
        """True each checkpoint.every steps, and when a version of the data was taken up: a resumed
        run must not choose another one."""
        return self.step % self.settings.checkpoint.every == 0 or self.feed.state.begins_version

    def _engine_settings(self) -> EngineSettings:
        settings = self.settings
        return EngineSettings(
            optim=settings.optim,
            engine=settings.engine,
            compress=settings.compress,
            seed=settings.loop.seed,
            errors=settings.checkpoint.errors,
            judge=self.recovery.guard.judge,
        )

    def _note_failure(self) -> None:
        if error := self.checkpoints.failure():
            self.log.note("save_error", error)

    def _note_version(self) -> None:
        if self.feed.state.begins_version:
            self.log.note("data_version", self._versions.number)

    def _slices(self) -> Iterator[StateSlice]:
        yield from self.engine.error_slices()
        yield from self.engine.state_slices()
        yield from self.average.slices()

    def _loss_now(self) -> float | None:
        """The validation loss at this step, if it was validated."""
        return self._scored[1] if self._scored and self._scored[0] == self.step else None

    def _facts_of_step(self, state: Position) -> dict[str, Any]:
        position = {"epoch": state.epoch, "step": state.step - 1}
        return {
            "stage": self.stage,
            "step": self.step,
            "position": position,
            "versions": state.all_versions,
            "checkpoint": self.checkpoints.whole,
            "config": self.config,
            "history": self.history,
        }

    def _resume(self) -> None:
        reader = self.checkpoints.newest()
        if reader is None:
            self.start()
            return
        changes = accept_config(reader, self.config)
        self.resume_from(reader)
        self.history = [*reader.facts.get("history", []), *changes]
        LOG.info("resumed from %s", reader.url)
        if self.world.rank == 0:
            tell_differences(reader, changes, self.numerics, self.settings.compress.on)
            if self.step < self.settings.loop.end:
                remove_other_model(self.settings.out, self.stage, self.settings.loop.steps)
        self.folder.note_history(self.history)

    def start(self) -> None:
        """Load the weights of settings.init at step 0, if it is set; collective."""
        refuse_changes(self.settings)
        self.history = self._start.load(self.engine, self.average)
        self.folder.note_history(self.history)

    def _rewind(self) -> None:
        """Go back to the newest checkpoint, and skip the data of the skipped updates."""
        self.checkpoints.saver.settle()
        reader = self.checkpoints.newest()
        reached = self.step
        if reader is None:
            raise self.recovery.too_early(reached)
        self.resume_from(reader)
        self.feed.resume(self.recovery.rewound(self.feed.state, self.step, reached))
        self.folder.begin(self.step)
        self.profile.open(self.step)

    def _save_surely(self) -> None:
        """Write the last checkpoint, with retries in case disk space becomes free.

        Raises: TrainingError if all attempts fail.
        """
        save_surely(self.save, self.checkpoints.saver.wait, tells=self.world.rank == 0)

    def _finish(self) -> None:
        """Validate, save and write the finished model, unless that of this step exists already."""
        whole = self.world.rank == 0 and model_is_whole(self.settings.out, self.stage, self.step)
        if self.world.gather_text("yes" if whole else "")[0] and self._resumed_at == self.step:
            return
        row = self.validate()
        if self._resumed_at != self.step:
            self._save_surely()
        facts = {**self.task.facts(), **self._start.facts, "step": self.step, "validation": row}
        facts |= {"numerics": to_json(self.numerics), "history": self.history}
        sizes = to_json(self.task.model_config)
        save_model(
            self.settings.out,
            FinishedModel(stage=self.stage, config=sizes, facts=facts),
            (self.checkpoints.store, f"step-{self.step}"),
            1e9 * self.settings.checkpoint.shard_gigabytes,
            Writers(rank=self.world.rank, size=self.world.size, gather=self.world.gather_text),
        )
        self.world.barrier()


def _stream(task: Task[Any], settings: StageConfig, mesh: Mesh) -> Batches:
    """The stream of this replica's training data."""
    return open_stream(
        task.train,
        seed=settings.loop.seed,
        batch=settings.loop.global_batch_size,
        order=settings.order,
        loader=settings.loader,
        rank=mesh.data.rank,
        ranks=mesh.data.size,
        reads=mesh.needs_data,
        pauses=settings.grow,
    )
