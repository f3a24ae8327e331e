"""The verbs verify, seen, batch, diverge and replay."""

from pathlib import Path
from typing import Annotated

import tyro

from core.errors import InputError
from core.flags import PositionalPath, PositionalText, parse, print_json
from core.log import LOG
from training.run.history import History
from workflow.verify import verify_path


def seen(arguments: list[str]) -> None:
    """`tapir seen ID`."""

    def run(pair: PositionalText, run: Path = Path("runs/prior"), json: bool = False) -> None:
        """Show the training steps that read a pair.

        Args:
            pair: id or key of the pair
            run: run folder of a prior, dVAE or CLIP
            json: print a JSON object on the last line
        """
        steps = History(run).seen(pair)
        text = ", ".join(map(str, steps)) or "never: left out at the ends of its epochs"
        LOG.info("%s is read at step %s", pair, text)
        if json:
            print_json({"steps": steps})

    parse(run, arguments, "seen")


def batch(arguments: list[str]) -> None:
    """`tapir batch STEP`."""

    def run(
        step: Annotated[int, tyro.conf.Positional],
        run: Path = Path("runs/prior"),
        json: bool = False,
    ) -> None:
        """List the pairs of a training step: slot, id, key (of raw pairs), shard, block, record.

        Args:
            step: the step, as in metrics.jsonl
            run: run folder of a prior, dVAE or CLIP
            json: print a JSON object on the last line
        """
        rows = History(run).batch(step)
        for row in rows:
            LOG.info(
                "%5d  %d %s  %s block %d record %d%s",
                *(row.slot, row.id, row.key, row.shard, row.block, row.record),
                f" of {row.data}" if row.data else "",
            )
        if json:
            print_json({"pairs": rows})

    parse(run, arguments, "batch")


def diverge(arguments: list[str]) -> None:
    """`tapir diverge A B`."""

    def run(
        first: PositionalPath,
        second: PositionalPath,
        checkpoint: Path | None = None,
        tolerance: float | None = None,
        json: bool = False,
    ) -> None:
        """Find the first tensor in which two runs differ, over one step from one checkpoint.

        Exits with 0 whether they differ or not.

        Args:
            first: run folder that is the reference
            second: run folder to compare with it
            checkpoint: a folder step-N to start from; default the newest of the first run
            tolerance: relative difference of a tensor that still counts as equal; by default 1e-5,
                and 2e-2 if a run has 16 bits
            json: print a JSON object on the last line
        """
        from training.recovery import diverge as comparison  # noqa: PLC0415 - imports every engine's parts

        if tolerance is not None and not tolerance >= 0:
            raise InputError(f"--tolerance {tolerance} must not be negative")
        differences = comparison.diverge(first, second, checkpoint, tolerance)
        for row in differences[:1]:
            where = f" on rank {row.rank}" if row.rank >= 0 else ""
            LOG.info(
                "first difference: %s pass, layer %s, %s%s: %.3g relative; %d tensors differ",
                *(row.direction, row.layer, row.tensor, where, row.relative, len(differences)),
            )
        if not differences:
            LOG.info("no tensor differs by more than the tolerance")
        if json:
            print_json({"differences": differences})

    parse(run, arguments, "diverge")


def replay(arguments: list[str]) -> None:
    """`tapir replay CAPSULE`."""

    def run(capsule: PositionalPath, json: bool = False) -> None:
        """Run a rejected step (a spike, NaN or corruption) again, on one process.

        Args:
            capsule: a file of the run folder's capsules
            json: print a JSON object on the last line
        """
        from training.recovery import replay as again  # noqa: PLC0415 - imports every engine's parts

        result = again.replay(capsule)
        LOG.info("%s", again.describe(result))
        if json:
            print_json(result)

    parse(run, arguments, "replay")


def verify(arguments: list[str]) -> None:
    """`tapir verify PATH`."""

    def run(path: PositionalText, sample: float = 1.0) -> None:
        """Check every digest of a data set, a run folder, a checkpoint or a finished model.

        Args:
            path: s3://bucket/prefix or a folder
            sample: fraction of a data set's blocks that is read; 1 = every byte of its shards
        """
        if not 0 < sample <= 1:
            raise InputError(f"--sample {sample} must be above 0 and at most 1")
        checked = verify_path(path, sample)
        if not checked:
            raise InputError(f"{path} holds no data set, checkpoint or finished model")
        print_json({"verified": checked})

    parse(run, arguments, "verify")
