"""The verb plan."""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import tyro

from core.cli import parse, print_json
from core.errors import EXIT_FAILED, InputError
from core.files import canonical_json, refuse_folder, write_atomic
from core.log import LOG
from core.settings import check
from models.config import PriorConfig
from planning.config import ClusterFlags, PlanFlags
from planning.filled import filled
from planning.hardware import hardware_of
from planning.parts import named, parts_of
from planning.report import plan_json, published_json, show, show_published
from planning.search import search
from training.config import PriorTrain
from training.presets import PRESETS

_FLAT = tyro.conf.OmitArgPrefixes
_USUAL = ClusterFlags()


def plan(arguments: list[str]) -> None:
    """`tapir plan PRESET --world N --gpu NAME`."""

    def run(
        preset: Annotated[str, tyro.conf.Positional] = "",
        world: int = 0,
        gpu: str = "h100",
        batch: int = 0,
        calibration: Path | None = None,
        calibrate: Path | None = None,
        published: bool = False,
        picture: Path | None = None,
        json: bool = False,
        cluster: Annotated[ClusterFlags, _FLAT] = _USUAL,
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
    from planning.calibrate import calibrate as measure  # noqa: PLC0415 - starts ranks

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


def settings_of(preset: str, batch: int = 0) -> PriorTrain:
    """A prior's preset with the vocabularies and grid that its data will have.

    Raises: InputError for an unknown preset.
    """
    known = PRESETS["prior"]
    if preset not in known:
        raise InputError(f"there is no prior preset {preset!r} (known: {', '.join(known)})")
    settings: PriorTrain = filled(preset, known[preset]())
    loop = replace(settings.loop, batch=batch or settings.loop.batch)
    return replace(settings, loop=loop)


def count_parameters(config: PriorConfig) -> int:
    """Parameters of the whole model, from its layers."""
    return sum(held.numel for held in named(parts_of(config, 0, 1)).values())
