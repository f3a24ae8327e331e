"""What happens after a step that must not count: skip, note it in a capsule, go back.

A capsule is a small sealed file from which `tapir replay` runs the step again.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import TapirError, TrainingError
from core.files import seal, sha256, write_atomic
from core.log import LOG
from data_pipeline.stream import StreamState
from parallel.engines.protocol import Engine, StepResult
from parallel.mesh import Mesh
from parallel.replicas import different
from training.config import GuardConfig
from training.guards import Guard

CAPSULES = "capsules"
_MOST_CAPSULES = 20
_MOST_REWINDS = 3
"""Rewinds without a step beyond those before."""


class Recovery:
    """The guards of one run; all ranks call it together and decide alike."""

    def __init__(self, config: GuardConfig, mesh: Mesh, out: Path) -> None:
        self.guard = Guard(config)
        self._config, self._mesh, self._out = config, mesh, out
        self._bad: list[tuple[int, int]] = []
        """(epoch, step in it) of the updates skipped in a row."""
        self._rewinds, self._farthest = 0, -1

    def must_rewind(
        self, result: StepResult, records: Sequence[Any], state: StreamState, facts: dict[str, Any]
    ) -> bool:
        """Note a skipped update; True if so many were skipped in a row that the run goes back.

        `state` is the position behind the batch, `facts` stand in the capsule.
        """
        if not result.skipped:
            self._bad.clear()
            return False
        step = facts["step"]
        LOG.warning("step %d: %s; the update is skipped", step, result.skipped)
        self._bad.append((state.epoch, state.step - 1))
        self._write_capsule(result, records, facts)
        return len(self._bad) == self._config.rewind_after

    def rewound(self, state: StreamState, step: int, reached: int) -> StreamState:
        """The checkpoint's position with the data that caused it passed over.

        `step` is the checkpoint's, `reached` the one that the run had come to.
        Raises: TrainingError if the run goes back again and again.
        """
        self._rewinds = 1 if reached > self._farthest else self._rewinds + 1
        self._farthest = max(self._farthest, reached)
        if self._rewinds > _MOST_REWINDS:
            raise TrainingError(
                f"step {reached}: {len(self._bad)} updates in a row were skipped, {_MOST_REWINDS} "
                "rewinds and other data did not help; lower optim.lr, or look at a capsule with "
                "`tapir replay`"
            )
        LOG.warning(
            "back to step %d; the data of %d skipped updates is passed over", step, len(self._bad)
        )
        passed = {*map(tuple, state.passed), *self._bad}
        self._bad.clear()
        return state.passing(sorted(passed))

    def too_early(self, step: int) -> TrainingError:
        """The error of a run that must go back before its first checkpoint."""
        return TrainingError(
            f"step {step}: {len(self._bad)} updates in a row were skipped before the first "
            "checkpoint; lower optim.lr or guard.sigmas"
        )

    def compare_replicas(self, engine: Engine, step: int) -> None:
        """Compare what replicas hold in common.

        Raises: TapirError on every rank, naming the ranks that differ from the others.
        """
        wrong: set[int] = set()
        for tensors, group in engine.replicas():
            wrong |= set(different(tensors, group))
        found = self._mesh.world.gather_text(json.dumps(sorted(wrong)))
        ranks = sorted({rank for text in found for rank in json.loads(text)})
        if ranks:
            raise TapirError(
                f"step {step}: the weights of rank {', '.join(map(str, ranks))} differ from their "
                "replicas': silent corruption (memory, GPU or a bug); nothing of this step was "
                "saved, and training goes on from the last checkpoint; check that machine"
            )

    def due(self, step: int) -> bool:
        """Say whether the replicas shall be compared after this step."""
        every = self._config.compare_every
        return bool(every) and step % every == 0

    def _write_capsule(
        self, result: StepResult, records: Sequence[Any], facts: dict[str, Any]
    ) -> None:
        own = {"replica": self._mesh.data.rank, "records": [record_id(r) for r in records]}
        parts = [json.loads(text) for text in self._mesh.world.gather_text(json.dumps(own))]
        batch = {row["replica"]: row["records"] for row in parts if row["records"]}
        if self._mesh.world.rank:
            return
        ids = [name for replica in sorted(batch) for name in batch[replica]]
        body = {
            **facts,
            "reason": result.skipped,
            "losses": {name: _number(value) for name, value in result.losses.items()},
            "grad_norm": _number(result.grad_norm),
            "records": ids,
            "digest": sha256(json.dumps(ids).encode()),
        }
        folder = self._out / CAPSULES
        old = sorted(folder.glob("step-*.json"), key=lambda path: path.stat().st_mtime)
        for path in old[: len(old) + 1 - _MOST_CAPSULES]:
            path.unlink(missing_ok=True)
        try:
            write_atomic(folder / f"step-{facts['step']}.json", seal(body))
        except OSError as error:
            LOG.error("cannot write a replay capsule: %s", error)


def record_id(record: Any) -> str:
    """The name of a pair: its key, or the hash of it in token records."""
    return str(record.key if hasattr(record, "key") else record.id)


def checkpoints_of_capsules(out: Path) -> set[int]:
    """Steps of the checkpoints that the newest capsule's replay starts from."""
    found = sorted((out / CAPSULES).glob("step-*.json"), key=lambda path: path.stat().st_mtime)
    steps = set()
    for path in found[-1:]:
        start = json.loads(path.read_text()).get("checkpoint")
        if start is not None:
            steps.add(int(start))
    return steps


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
