"""The verb plan."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from core.cli import parse, print_json
from core.errors import InputError
from core.files import canonical_json, write_atomic
from core.log import LOG
from models.config import PriorConfig
from planning.filled import filled
from planning.hardware import Hardware, hardware_of
from planning.parts import named, parts_of
from planning.report import plan_json, published_json, show, show_published
from planning.search import search
from training.config import PriorTrain
from training.presets import PRESETS

_FLAT = tyro.conf.OmitArgPrefixes
GIGABIT = 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """What of the cluster differs from the defaults of its GPU; 0 = the default."""

    a_node: int = 0
    """GPUs a node."""
    network: float = 0.0
    """Gbit/s that a node sends to the others."""
    link: float = 0.0
    """GB/s that a GPU sends inside a node."""
    memory: float = 0.0
    """GB a GPU."""
    cost_hour: float = 0.0
    """Dollars a GPU and hour."""

    def applied(self, hardware: Hardware) -> Hardware:
        """The hardware with these in place."""
        units = {"network": GIGABIT, "link": 1e9, "memory": 1e9}
        given = {n: v * units.get(n, 1) for n, v in vars(self).items() if v}
        given |= {"a_node": self.a_node} if self.a_node else {}
        return replace(hardware, **given)


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
        cluster: Annotated[ClusterFlags, _FLAT] = ClusterFlags(),
    ) -> None:
        """Say if a prior fits on a cluster, how it runs fastest there, and how long that takes.

        Nothing is allocated and no GPU is needed: one rank's real layers are laid out without
        values, and counted. Days and cost are those of the preset's updates.

        Args:
            preset: of a prior: tiny, small, paper_2_8b, paper_5_6b, paper_12b
            world: ranks; by default those of the preset's mesh
            gpu: v100-16gb, v100-32gb, a100-40gb, a100-80gb, h100, or cpu for this machine
            batch: samples a step; by default the preset's
            calibration: a file that --calibrate wrote, in place of data sheets
            calibrate: measure this machine and write this file; no preset needed
            published: show the model's predictions for published runs; no preset needed
            picture: write memory and a step's timeline to FILE.svg or FILE.png
            json: print a JSON object on the last line
            cluster: what differs from a usual cluster of these GPUs
        """
        if calibrate is not None:
            from planning.calibrate import calibrate as measure  # noqa: PLC0415 - starts ranks

            constants = measure()
            write_atomic(calibrate, canonical_json(constants))
            LOG.info("wrote %s", calibrate)
            if json:
                print_json(constants)
            return
        if published:
            shown = published_json()
            show_published(shown)
            if json:
                print_json(shown)
            return
        settings = settings_of(preset, batch)
        hardware = cluster.applied(hardware_of(gpu, calibration))
        _plan(settings, world or settings.mesh.world, hardware, picture, json)

    parse(run, arguments, "plan")


def _plan(
    settings: PriorTrain, world: int, hardware: Hardware, picture: Path | None, json: bool
) -> None:
    found = search(settings, world, hardware)
    parameters = count_parameters(settings.model)
    show(found, parameters, hardware)
    if picture is not None:
        from planning.picture import draw  # noqa: PLC0415 - matplotlib takes a second

        draw(found, hardware, picture)
        LOG.info("wrote %s", picture)
    if json:
        print_json(plan_json(found, parameters, hardware))


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
