"""`tapir replay CAPSULE`: repeat a bad step in one process.

The replay starts at the capsule's checkpoint and repeats all steps up to the bad one, with the
reference engine and without compression; it evaluates the bad step's loss for each sample.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.reader import CheckpointReader, finished_steps, open_checkpoint
from core.errors import CorruptError, InputError
from core.files.atomic import Json, unseal
from core.heartbeat import Heart
from core.storage.store import open_store
from parallel.config import CompressConfig, MeshConfig
from parallel.ledger import recorded
from parallel.mesh import own_mesh
from training.initial.weights import INIT
from training.recovery.rewind import record_digest, record_id
from training.stages import make_task, settings_from_json
from training.tasks.task import hand_over
from training.trainer import Run

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result of a replay."""

    step: int
    reason: str
    """Why the run skipped the step."""
    loss: float
    loss_then: Any
    grad_norm: float
    grad_norm_then: Any
    skipped: str
    """Why the replay skips it; empty if not, which points to the hardware instead of the data."""
    same_records: bool
    """True if the batch equals the recorded one."""
    worst: list[tuple[str, float]]
    """(sample, loss) of the highest losses."""


def replay(capsule: Path) -> Replay:
    """Replay a capsule.

    Raises: InputError if it is not a capsule, or its checkpoint is gone.
    """
    if not capsule.is_file():
        raise InputError(f"there is no capsule {capsule}; a run keeps them in its folder capsules")
    try:
        body = unseal(capsule.read_bytes(), str(capsule))
    except CorruptError as error:
        raise InputError(f"{capsule} is not a capsule, or a byte of it changed") from error
    if not {"position", "records", "config", "checkpoint"} <= body.keys():
        raise InputError(f"{capsule} is not a capsule; a run keeps them in its folder capsules")
    with tempfile.TemporaryDirectory(prefix="tapir-replay-") as out, _run_of(body, out) as run:
        return _replay(run, body)


def _replay(run: Run, body: dict[str, Any]) -> Replay:
    steps = run.feed.steps(run.step)
    data = next(steps)
    while run.step + 1 < body["step"]:
        run.one_step(data.micro)
        data = next(steps)
    records = data.records
    losses = _losses_of(run, records)
    result = run.one_step(data.micro)
    rows = [[record_id(record), record_digest(record)] for record in records]
    worst = sorted(zip((name for name, _ in rows), losses, strict=True), key=lambda row: -row[1])
    return Replay(
        step=body["step"],
        reason=body["reason"],
        loss=result.losses["loss"],
        loss_then=body["losses"].get("loss"),
        grad_norm=result.grad_norm,
        grad_norm_then=body["grad_norm"],
        skipped=result.skipped,
        same_records=sorted(rows) == sorted(body["records"]),
        worst=worst[:_SHOWN],
    )


def _losses_of(run: Run, records: Sequence[Any]) -> list[float]:
    device = run.world.device
    batches = (hand_over(run.task.batch([record], run.step), device) for record in records)
    return [float(run.engine.evaluate(batch)["loss"]) for batch in batches]


@contextlib.contextmanager
def _run_of(body: dict[str, Any], out: str) -> Iterator[Run]:
    """The capsule's run in this process, resumed from its checkpoint."""
    config = {name: value for name, value in body["config"].items() if name != "stage"}
    settings = settings_from_json(body["stage"], config, "the capsule")
    home = settings.checkpoint.to or str(settings.out / "checkpoints")
    replicas = settings.mesh.data * settings.engine.gradient_accumulation_steps
    engine = dataclasses.replace(
        settings.engine, name="reference", zero_stage=1, gradient_accumulation_steps=replicas
    )
    settings = dataclasses.replace(
        settings,
        resume_with="",  # its changes are in the settings
        out=Path(out),
        mesh=MeshConfig(),
        engine=engine,
        compress=CompressConfig(),
        checkpoint=dataclasses.replace(settings.checkpoint, to=out),
    )
    mesh = own_mesh()
    with recorded(mesh) as ledger:
        task = make_task(body["stage"], settings, mesh)
        run = Run(body["stage"], task, settings, mesh, ledger, Heart(0))
        try:
            if body["checkpoint"] is not None:
                run.resume_from(_checkpoint(home, body["checkpoint"]))
            else:
                run.start()
                _refuse_other_init(run, body)
            if "versions" in body:  # a version may have been taken up since the checkpoint
                run.feed.resume(run.feed.state.reading(body["versions"]))
            yield run
        finally:
            run.close()


def _refuse_other_init(run: Run, body: dict[str, Any]) -> None:
    """Check that the weights at `init` are those that the run started from."""
    (now, then) = (_init_digest(history) for history in (run.history, body.get("history", [])))
    if then not in ("", now):
        raise InputError(
            f"the capsule's run started from other weights (sha256 {then}) than init="
            f"{run.settings.init!r} holds now (sha256 {now}); put them back there"
        )


def _init_digest(history: list[Json]) -> str:
    """Digest of the weights that a run started from; empty if it drew them, or is older."""
    return next((str(event["digest"]) for event in history if event["event"] == INIT), "")


def _checkpoint(home: str, step: int) -> CheckpointReader:
    steps = finished_steps(open_store(home))
    if step not in steps:
        raise InputError(
            f"the replay starts from {home}/step-{step}, which is gone (there: {steps}); runs keep "
            "those of the newest capsules, and all with a larger --checkpoint.keep"
        )
    return open_checkpoint(f"{home}/step-{step}")


def describe(result: Replay) -> str:
    """Format the result for the terminal."""
    again = f"skipped again: {result.skipped}" if result.skipped else "not skipped this time"
    data = "the same records" if result.same_records else "OTHER RECORDS than then"
    rows = [f"  {name}  loss {loss:.4g}" for name, loss in result.worst]
    return "\n".join(
        [
            f"step {result.step}, then: {result.reason}",
            f"now {again}, on {data}",
            f"loss {result.loss:.6g} (then {result.loss_then}), "
            f"gradient norm {result.grad_norm:.6g} (then {result.grad_norm_then})",
            "samples with the highest loss:",
            *rows,
        ]
    )
