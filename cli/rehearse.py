"""The verb rehearse."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from core.config import to_json
from core.errors import EXIT_FAILED, EXIT_WRONG_INPUT, ConfigError, InputError, did_you_mean
from core.flags import parse_over, print_json
from core.log import LOG
from core.memory import size_text
from planning.config import MOST_RANKS, filled
from planning.rehearsal.pool import Pool
from planning.rehearsal.rehearse import Rehearsal, checked, rehearse, scaled
from training.presets import PRESETS

STAGES = ("prior", "dvae", "clip")
"""Stages that have a mesh; a preset's name is looked for in this order."""
DEVICES = ("cuda", "cpu")
HELP = """usage: tapir rehearse PRESET|all [--world N] [--stage STAGE] [--device cuda|cpu]
                      [--jobs N] [--json] [flags]

Prove that the collectives of all ranks match in order, group, type, size and device: a deadlock is
found before a cluster is paid for. One rank of each role runs the real loop and engine in a world
that is only claimed, on tensors without memory: steps, a validation, a save, one more step, and the
end of a run. Then all ranks' calls are played together. No GPU is needed or touched.

  PRESET       a preset of tapir train; `all` rehearses every one, and names those that cannot be
               laid out so at the end
  --world N    ranks; the data-parallel degree follows. The global batch stays where it can be
               dealt out in micro-batches of the preset's size; else each replica keeps its
               samples (default: the preset's mesh)
  --device     what each rank has: a GPU (cuda, the default), whose tensors nccl carries and whose
               pickled objects gloo; or cpu, where gloo carries all
  --stage      prior, dvae or clip; by default the first one that has this preset
  --jobs N     ranks that run at a time (default: the cores of this machine)
  --json       print a JSON object on the last line
  flags        those of the preset: tapir train STAGE PRESET --help

Exit codes: 0 all match, 1 a mismatch, 2 wrong input.
"""


def rehearse_verb(arguments: list[str]) -> None:
    """`tapir rehearse PRESET`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        if not arguments:
            raise InputError("name a preset, e.g. tapir rehearse paper_12b --world 1024")
        return
    preset, *rest = arguments
    own, flags = _own_flags(rest)
    world = _number(own, "--world", 0)
    jobs = _number(own, "--jobs", os.cpu_count() or 1)
    wanted, refused = laid_out(_chosen(preset, own.get("--stage", "")), flags, world)
    if refused and preset != "all":
        (name, reason), *_ = refused.items()
        raise ConfigError(f"{name} cannot be rehearsed:\n{reason}")
    found = _rehearsed(wanted, jobs, _device(own))
    for name, reason in refused.items():
        LOG.error("%s was not rehearsed:\n%s", name, reason)
    matches = all(one.matches for one in found)
    if "--json" in own:
        rows = [{**to_json(one), "matches": one.matches} for one in found]
        whole = {"matches": matches, "rehearsals": rows, "refused": refused}
        print_json(whole if preset == "all" else rows[0])
    if refused or not matches:
        sys.exit(EXIT_WRONG_INPUT if matches else EXIT_FAILED)


def _rehearsed(wanted: list[tuple[str, str, Any]], jobs: int, device: str) -> list[Rehearsal]:
    found: list[Rehearsal] = []
    if not wanted:
        return found
    with Pool(device) as pool:
        for stage, name, settings in wanted:
            found.append(rehearse(name, stage, settings, pool, jobs=jobs))
            print("\n".join(_lines(found[-1])), flush=True)
    return found


def laid_out(
    pairs: Iterable[tuple[str, str]], flags: list[str], world: int
) -> tuple[list[tuple[str, str, Any]], dict[str, str]]:
    """Stage, preset and settings of those that can be rehearsed; of others what is wrong."""
    wanted, refused = [], {}
    for stage, name in pairs:
        try:
            wanted.append((stage, name, _settings(stage, name, flags, world)))
        except ConfigError as error:
            refused[f"{stage} {name}"] = str(error)
    return wanted, refused


def _settings(stage: str, name: str, flags: list[str], world: int) -> Any:
    """A preset, changed by flags and laid out on so many ranks. Raises: ConfigError."""
    settings = PRESETS[stage][name]()
    if flags:
        settings = parse_over(settings, flags, f"rehearse {name}")
    settings = filled(name, settings)
    return checked(scaled(settings, world or settings.mesh.world))


def _own_flags(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """This verb's flags, and what is left for the preset."""
    own: dict[str, str] = {}
    rest = list(arguments)
    flags: list[str] = []
    while rest:
        name, separator, value = rest.pop(0).partition("=")
        if name == "--json":
            own[name] = ""
        elif name in ("--world", "--stage", "--device", "--jobs"):
            if not separator:
                if not rest:
                    raise InputError(f"{name} needs a value")
                value = rest.pop(0)
            own[name] = value
        else:
            flags.append(name + separator + value)
    return own, flags


def _device(own: dict[str, str]) -> str:
    device = own.get("--device", DEVICES[0])
    if device not in DEVICES:
        raise InputError(f"--device {device!r} is neither {' nor '.join(DEVICES)}")
    return device


def _number(own: dict[str, str], name: str, default: int) -> int:
    text = own.get(name)
    if text is None:
        return default
    number = int(text) if text.isdecimal() and len(text) <= len(str(MOST_RANKS)) else 0
    if not 1 <= number <= MOST_RANKS:
        raise InputError(f"{name} {text!r} is no positive whole number up to {MOST_RANKS:,}")
    return number


def _chosen(preset: str, stage: str) -> Iterator[tuple[str, str]]:
    """Stages and presets that are meant."""
    if stage and stage not in STAGES:
        raise InputError(f"there is no stage {stage!r} with ranks (known: {', '.join(STAGES)})")
    pairs = [(s, name) for s in ([stage] if stage else STAGES) for name in PRESETS[s]]
    if preset == "all":
        yield from pairs
        return
    found = [(s, name) for s, name in pairs if name == preset]
    if not found:
        names = list(dict.fromkeys(name for _, name in pairs))
        hint = did_you_mean(preset, names)
        raise InputError(f"there is no preset {preset!r}{hint} (known: {', '.join(names)}, all)")
    yield found[0]


def _times(count: int, what: str, more: str = "s") -> str:
    return f"{count} {what}" + (more if count > 1 else "")


def _lines(found: Rehearsal) -> list[str]:
    """A rehearsal for the terminal."""
    mesh = found.mesh
    cut = f", {mesh.machines} machines" if mesh.machines > 1 else ""
    calls = ", ".join(f"{kind} {count}" for kind, count in sorted(found.calls.items()))
    carriers = ", ".join(f"{name} {count}" for name, count in sorted(found.backends.items()))
    lines = [
        f"{found.stage} {found.preset}: {mesh.world} ranks = data {mesh.data} x tensor "
        f"{mesh.tensor} x pipeline {mesh.pipeline}{cut}; batch {found.batch:,}, "
        f"{_times(found.micro_batches, 'micro-batch', 'es')} a step",
        f"  {found.roles} roles ran {found.steps} steps with a validation and a save, and the end "
        f"of a run, on {found.device} in {found.seconds:.0f} s; rank 0: {calls}; by {carriers}",
    ]
    if found.mismatch is not None:
        return [*lines, found.mismatch.report()]
    done = f"{found.operations:,} calls, {size_text(found.bytes)}"
    return [*lines, f"  all ranks match: {done} over all ranks"]
