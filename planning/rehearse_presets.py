"""Rehearse one preset or all, on a chosen number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError, InputError, did_you_mean
from core.flags import parse_over
from planning.config import filled
from planning.rehearsal.pool import Pool
from planning.rehearsal.rehearse import Rehearsal, checked, rehearse, scaled
from training.presets import PRESETS
from training.run.resume_with import with_changes

STAGES = ("prior", "dvae", "clip")
"""Stages that have a mesh; a preset's name is looked up in this order."""
OWN_FLAGS = ("world", "stage", "device", "jobs", "json")
"""Flags of the verb; all others are a preset's."""
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Rehearsals:
    """Results of rehearsing presets."""

    rehearsals: list[Rehearsal]
    refused: dict[str, str]
    """Stage and preset that cannot run on this number of ranks -> why."""

    @property
    def matches(self) -> bool:
        """True if all ranks' collectives match in every rehearsal."""
        return all(one.matches for one in self.rehearsals)


def rehearse_presets(
    preset: str,
    stage: str,
    flags: list[str],
    world: int,
    jobs: int,
    device: str,
    tell: Callable[[Rehearsal], None],
) -> Rehearsals:
    """Rehearse a preset, or all of them; `tell` is called with each result as it is done.

    Raises: InputError for an unknown stage or preset; ConfigError if a single preset cannot run on
    `world` ranks.
    """
    rehearsed, refused = laid_out(chosen(preset, stage), flags, world, device)
    if refused and preset != ALL:
        (name, reason), *_ = refused.items()
        raise ConfigError(f"{name} cannot be rehearsed:\n{reason}")
    rehearsals: list[Rehearsal] = []
    if rehearsed:
        with Pool(device) as pool:
            for its_stage, name, settings in rehearsed:
                rehearsals.append(rehearse(name, its_stage, settings, pool, jobs=jobs))
                tell(rehearsals[-1])
    return Rehearsals(rehearsals=rehearsals, refused=refused)


def chosen(preset: str, stage: str) -> Iterator[tuple[str, str]]:
    """(stage, preset) of each chosen preset."""
    if stage and stage not in STAGES:
        raise InputError(f"there is no stage {stage!r} with ranks (known: {', '.join(STAGES)})")
    pairs = [(s, name) for s in ([stage] if stage else STAGES) for name in PRESETS[s]]
    if preset == ALL:
        yield from pairs
        return
    named = [(s, name) for s, name in pairs if name == preset]
    if not named:
        names = list(dict.fromkeys(name for _, name in pairs))
        hint = did_you_mean(preset, names)
        raise InputError(f"there is no preset {preset!r}{hint} (known: {', '.join(names)}, {ALL})")
    yield named[0]


def laid_out(
    pairs: Iterable[tuple[str, str]], flags: list[str], world: int, device: str = "cpu"
) -> tuple[list[tuple[str, str, Any]], dict[str, str]]:
    """(stage, preset, settings) of presets that can be rehearsed, and the problems of others."""
    settings, refused = [], {}
    for stage, name in pairs:
        try:
            settings.append((stage, name, _settings(stage, name, flags, world, device)))
        except ConfigError as error:
            refused[f"{stage} {name}"] = str(error)
    return settings, refused


def _settings(stage: str, name: str, flags: list[str], world: int, device: str) -> Any:
    """A preset, changed by flags and scaled to `world` ranks. Raises: ConfigError."""
    settings = PRESETS[stage][name]()
    if flags:
        settings = parse_over(settings, flags, f"rehearse {name}", others=OWN_FLAGS)
        settings = with_changes(settings)
    settings = filled(name, settings)
    return checked(scaled(settings, world or settings.mesh.world), device)
