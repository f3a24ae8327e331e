"""Recovery from bad steps: skip the update, write a capsule, rewind to a checkpoint.

A capsule is a small sealed file that `tapir replay` reads to repeat the step.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import CorruptError, TapirError, TrainingError
from core.files.atomic import seal, sha256, unseal, write_atomic
from core.log import LOG
from data_pipeline.streaming.state import StreamState
from parallel.engines.protocol import Engine, StepResult
from parallel.mesh import Mesh
from parallel.replicas import different, digest, group_name
from training.recovery.config import GuardConfig
from training.recovery.guards import Guard

CAPSULES = "capsules"
_MOST_CAPSULES = 20
_PROTECTED = 2
_MOST_REWINDS = 3
"""Maximum rewinds in a row without progress beyond the farthest step."""


class Recovery:
    """The guards of one run; collective, with equal decisions on all ranks."""

    def __init__(self, config: GuardConfig, mesh: Mesh, out: Path) -> None:
        self.guard = Guard(config)
        self._config, self._mesh, self._out = config, mesh, out
        self._bad: list[tuple[int, int]] = []
        """(epoch, step in the epoch) of the updates skipped since the last good one."""
        self._rewinds, self._farthest = 0, -1
        self._last: tuple[StepResult, Sequence[Any], dict[str, Any]] | None = None

    def must_rewind(
        self, result: StepResult, records: Sequence[Any], state: StreamState, facts: dict[str, Any]
    ) -> bool:
        """Record a skipped update; True at the guard.rewind_after-th in a row.

        `state` is the position after the batch, `facts` are written to the capsule.
        """
        self._last = (result, records, facts)
        if not result.skipped:
            self._bad.clear()
            return False
        step = facts["step"]
        self._warn(f"step {step}: {result.skipped}; the update is skipped")
        self._bad.append((state.epoch, state.step - 1))
        self._write_capsule(result.skipped)
        return len(self._bad) == self._config.rewind_after

    def rewound(self, state: StreamState, step: int, reached: int) -> StreamState:
        """The checkpoint's position `state`, set to skip the data of the bad updates.

        `step` is the checkpoint's step, `reached` the step before the rewind.
        Raises: TrainingError after _MOST_REWINDS rewinds without progress.
        """
        self._rewinds = 1 if reached > self._farthest else self._rewinds + 1
        self._farthest = max(self._farthest, reached)
        if self._rewinds > _MOST_REWINDS:
            raise TrainingError(
                f"step {reached}: {len(self._bad)} updates in a row were skipped, {_MOST_REWINDS} "
                "rewinds and other data did not help; lower optim.lr, or look at a capsule with "
                "`tapir replay`"
            )
        self._warn(f"back to step {step}; the data of {len(self._bad)} updates is skipped")
        passed = {*((epoch, step) for epoch, step in state.passed), *self._bad}
        self._bad.clear()
        return state.passing(sorted(passed))

    def too_early(self, step: int) -> TrainingError:
        """The error of a run that must rewind before its first checkpoint."""
        return TrainingError(
            f"step {step}: {len(self._bad)} updates in a row were skipped before the first "
            "checkpoint; lower optim.lr or guard.sigma_factor"
        )

    def compare_replicas(self, engine: Engine, step: int) -> None:
        """Compare the replicated tensors of all replicas.

        Raises: TapirError on every rank, naming the ranks that differ from the others.
        """
        world, mine = self._mesh.world, dict[str, str]()
        for tensors, group in engine.replicas():
            if group.size > 1:
                name = group_name(group)
                mine[name] = mine.get(name, "") + digest(tensors)
        rows = [json.loads(text) for text in world.gather_text(json.dumps(mine))]
        ranks = json.loads(world.gather_text(json.dumps(different(rows)))[0])
        if not ranks:
            return
        what = f"the weights of rank {', '.join(map(str, ranks))} differ from their replicas'"
        self._write_capsule(what)
        raise TapirError(
            f"step {step}: {what}: silent corruption (memory, GPU or a bug); nothing of this step "
            "was saved, and training goes on from the last checkpoint; check that node"
        )

    def due(self, step: int) -> bool:
        """True if guard.compare_every asks for a comparison of replicas after this step."""
        every = self._config.compare_every
        return bool(every) and step % every == 0

    def _warn(self, text: str) -> None:
        if self._mesh.world.rank == 0:
            LOG.warning("%s", text)

    def _write_capsule(self, reason: str) -> None:
        """Write the capsule of the last step; collective over all ranks."""
        if self._last is None:
            return
        result, records, facts = self._last
        rows = [[record_id(record), record_digest(record)] for record in records]
        own = {"replica": self._mesh.data.rank, "records": rows}
        parts = [json.loads(text) for text in self._mesh.world.gather_text(json.dumps(own))]
        batch = {row["replica"]: row["records"] for row in parts if row["records"]}
        if self._mesh.world.rank:
            return
        body = {
            **facts,
            "reason": reason,
            "losses": {name: _number(value) for name, value in result.losses.items()},
            "grad_norm": _number(result.grad_norm),
            "records": [row for replica in sorted(batch) for row in batch[replica]],
        }
        try:
            write_atomic(self._out / CAPSULES / f"step-{facts['step']}.json", seal(body))
            for path in _newest_capsules(self._out)[_MOST_CAPSULES:]:
                path.unlink()
        except OSError as error:
            LOG.error("cannot write a replay capsule: %s", error)


def record_id(record: Any) -> str:
    """A pair's key, or for token records the hash of it."""
    return str(record.key if hasattr(record, "key") else record.id)


def record_digest(record: Any) -> str:
    """Digest of a record's content, 16 hex digits."""
    parts = [
        getattr(record, name) for name in ("image", "text", "caption") if hasattr(record, name)
    ]
    data = [part.encode() if isinstance(part, str) else bytes(part) for part in parts]
    return sha256(b"|".join(data))[:16]


def checkpoints_of_capsules(out: Path) -> set[int]:
    """Checkpoint steps that the newest capsules start from, at most two."""
    steps: list[int] = []
    for path in _newest_capsules(out):
        try:
            start = unseal(path.read_bytes(), str(path)).get("checkpoint")
        except CorruptError as error:
            LOG.warning("%s", error)
            continue
        if start is not None and start not in steps:
            steps.append(int(start))
    return set(steps[:_PROTECTED])


def _newest_capsules(out: Path) -> list[Path]:
    capsules = (out / CAPSULES).glob("step-*.json")
    return sorted(capsules, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
