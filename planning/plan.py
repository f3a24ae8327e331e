"""`tapir plan`: a preset's fastest layouts on a cluster, and calibration of this machine."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from core.config import check
from core.files.atomic import canonical_json, refuse_folder, write_atomic
from core.log import LOG
from parallel.engines.frozen import absent_problem
from planning.config import PlanFlags, settings_of
from planning.dvae import dvae_names, dvae_parameters, dvae_trained, search_dvae
from planning.estimate.hardware import Hardware, hardware_of
from planning.estimate.layers import (
    Held,
    count_parameters,
    count_trained,
    named,
    rank_layers,
    training_of,
)
from planning.estimate.overlapped.search import TorchRow, search_torch
from planning.estimate.search import SearchResult, search
from training.config import DVAETrain


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layouts of a preset on a cluster, the fastest first."""

    result: SearchResult
    parameters: int
    """Parameters of the whole model, without adapters."""
    trained: int
    """Parameters that are trained; of adapters, they are what a run saves."""
    hardware: Hardware
    torch: list[TorchRow] = field(default_factory=list)
    """Layouts of engine torch."""


def make_plan(flags: PlanFlags) -> Plan:
    """Search the layouts, and draw the best one if --picture is given.

    Raises: ConfigError with every problem of the hardware or the preset; OSError, before the
    search, if the picture cannot be written.
    """
    hardware = flags.cluster.applied(hardware_of(flags.gpu, flags.calibration))
    check(hardware.problems())
    if flags.picture is not None:
        _refuse_unwritable(flags.picture)
    settings = planned_settings(flags)
    world = flags.world or settings.mesh.world
    rows: list[TorchRow] = []
    if isinstance(settings, DVAETrain):
        result, parameters = search_dvae(settings, world, hardware), dvae_parameters(settings.model)
        trained = dvae_trained(settings)
    else:
        result, parameters = search(settings, world, hardware), count_parameters(settings.model)
        trained = count_trained(settings)
        rows = search_torch(settings, world, hardware)
    if flags.picture is not None:
        from planning.picture import draw  # noqa: PLC0415 - matplotlib takes a second

        draw(result, hardware, flags.picture)
        LOG.info("wrote %s", flags.picture)
    return Plan(
        result=result, parameters=parameters, trained=trained, hardware=hardware, torch=rows
    )


def planned_settings(flags: PlanFlags) -> Any:
    """The preset's settings with the flags' options. Raises: ConfigError with every problem."""
    settings = settings_of(flags.preset, flags.batch, flags.freeze, flags.lora)
    if isinstance(settings, DVAETrain):
        settings = flags.dvae.applied(settings)
    else:
        settings = replace(settings, model=flags.model.applied(settings.model))
    check(settings.fixed_problems())
    if settings.freeze:
        names = _held(settings)
        check(list(filter(None, [absent_problem(list(names), settings.freeze)])))
        if not any(held.trained for held in names.values()):
            check(["freeze leaves no parameter to train; narrow the expression"])
    return settings


def _held(settings: Any) -> dict[str, Held]:
    """Global parameter name -> parameter of the whole model."""
    if isinstance(settings, DVAETrain):
        return dvae_names(settings)
    return named(rank_layers(settings.model, 0, 1, training_of(settings)))


def write_calibration(path: Path) -> dict[str, float]:
    """Measure this machine's constants and write them to a file.

    Raises: OSError, before the measurements, if the file cannot be written.
    """
    _refuse_unwritable(path)
    from planning.calibration.calibrate import calibrate  # noqa: PLC0415 - starts ranks

    constants = calibrate()
    write_atomic(path, canonical_json(constants))
    LOG.info("wrote %s", path)
    return constants


def _refuse_unwritable(path: Path) -> None:
    """Raise OSError if a file cannot be written there."""
    refuse_folder(path)
    with TemporaryFile(dir=path.parent):
        pass
