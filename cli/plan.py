"""The verb plan."""

import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

from core.config import check
from core.errors import EXIT_FAILED
from core.files.atomic import canonical_json, refuse_folder, write_atomic
from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from planning.config import ClusterFlags, PlanFlags, settings_of
from planning.estimate.hardware import hardware_of
from planning.estimate.layers import count_parameters
from planning.estimate.search import search
from planning.report import plan_json, published_json, show, show_published

_USUAL = ClusterFlags()


def plan(arguments: list[str]) -> None:
    """`tapir plan PRESET --world N --gpu NAME`."""

    def run(
        preset: PositionalText = "",
        world: int = 0,
        gpu: str = "h100",
        batch: int = 0,
        calibration: Path | None = None,
        calibrate: Path | None = None,
        published: bool = False,
        picture: Path | None = None,
        json: bool = False,
        cluster: Annotated[ClusterFlags, FLAT] = _USUAL,
    ) -> None:
        """Say if a prior fits on a cluster, how it runs fastest there, and how long that takes.

        Nothing is allocated and no GPU is needed: one rank's real layers are laid out without
        values, and counted. Days and cost are those of the preset's updates. Exit codes: 0 it fits,
        1 nothing fits, 2 wrong input.

        Args:
            preset: of a prior: tiny, small, paper_2_8b, paper_5_6b, paper_12b
            world: ranks; by default those of the preset's mesh
            gpu: v100-16gb, v100-32gb, a100-40gb, a100-80gb, h100, or cpu for this machine
            batch: samples a step; by default the preset's
            calibration: a file that --calibrate wrote, in place of the constants of --gpu cpu
            calibrate: measure this machine while it is idle (some minutes), and write this file;
                takes no preset
            published: show the model's predictions for published runs; takes no preset
            picture: write memory and a step's timeline to FILE.svg, FILE.png or FILE.pdf
            json: print a JSON object on the last line
            cluster: what differs from a usual cluster of these GPUs
        """
        flags = PlanFlags(
            preset=preset,
            world=world,
            gpu=gpu,
            batch=batch,
            calibration=calibration,
            calibrate=calibrate,
            published=published,
            picture=picture,
            json=json,
            cluster=cluster,
        )
        _run(flags)

    parse(run, arguments, "plan")


def _run(flags: PlanFlags) -> None:
    check(flags.problems())
    if flags.calibrate is not None:
        _calibrate(flags.calibrate, flags.json)
    elif flags.published:
        _published(flags.json)
    else:
        _plan(flags)


def _calibrate(path: Path, json: bool) -> None:
    _refuse_unwritable(path)
    from planning.calibration.calibrate import calibrate as measure  # noqa: PLC0415 - starts ranks

    constants = measure()
    write_atomic(path, canonical_json(constants))
    LOG.info("wrote %s", path)
    if json:
        print_json(constants)


def _published(json: bool) -> None:
    shown = published_json()
    show_published(shown)
    if json:
        print_json(shown)


def _plan(flags: PlanFlags) -> None:
    hardware = flags.cluster.applied(hardware_of(flags.gpu, flags.calibration))
    check(hardware.problems())
    if flags.picture is not None:
        _refuse_unwritable(flags.picture)
    settings = settings_of(flags.preset, flags.batch)
    check(settings.fixed_problems())
    found = search(settings, flags.world or settings.mesh.world, hardware)
    parameters = count_parameters(settings.model)
    show(found, parameters, hardware)
    if flags.picture is not None:
        from planning.picture import draw  # noqa: PLC0415 - matplotlib takes a second

        draw(found, hardware, flags.picture)
        LOG.info("wrote %s", flags.picture)
    if flags.json:
        print_json(plan_json(found, parameters, hardware))
    if not found.timed:
        sys.exit(EXIT_FAILED)


def _refuse_unwritable(path: Path) -> None:
    """Raise OSError if a file cannot be written there, before the work that fills it."""
    refuse_folder(path)
    with TemporaryFile(dir=path.parent):
        pass
