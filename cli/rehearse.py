"""The verb rehearse."""

import os
import sys
from collections.abc import Sequence

from core.config import check, to_json
from core.errors import EXIT_FAILED, EXIT_WRONG_INPUT, InputError
from core.flags import print_json
from core.log import LOG
from planning.config import MOST_RANKS
from planning.life.config import WORLDS, LifePlan
from planning.life.curves import facts, table, too_fast
from planning.life.life import live
from planning.rehearsal.rehearse import Rehearsal
from planning.rehearse_presets import ALL, rehearse_presets

DEVICES = ("cuda", "cpu")
HELP = """usage: tapir rehearse PRESET|all [--world N] [--stage STAGE] [--device cuda|cpu]
                      [--jobs N] [--json] [flags]
       tapir rehearse --life [--world N,N,...] [--checkpoints N] [--losses N] [--json]

Prove that the collectives of all ranks match in order, group, type, size and device, so that a
deadlock shows before a cluster is paid for. One rank of each role runs the real loop and engine
on fake tensors in a fake process group: steps, a validation, a save, one more step, and the end of
a run. Then the calls of all ranks are matched. No GPU is needed or used.

  PRESET       a preset of tapir train; `all` rehearses every one, and lists at the end those that
               cannot run on N ranks
  --world N    ranks; the data-parallel degree follows. The global batch is kept if it divides into
               micro-batches of the preset's size; else each replica keeps its number of samples
               (default: the preset's mesh)
  --device     device of each rank: cuda (the default), with nccl for tensors and gloo for pickled
               objects; or cpu, with gloo for both
  --stage      prior, dvae or clip; by default the first one that has this preset
  --jobs N     ranks that run at a time (default: the cores of this machine)
  --json       print a JSON object on the last line
  flags        flags of the preset: tapir train STAGE PRESET --help

With --life, the life of a run on this machine: the real launcher, supervisor, heartbeats, loop,
checkpoints, leases and metrics, with hundreds of ranks that have no model and no data. It starts,
writes checkpoints, loses ranks (SIGKILL), is preempted, started again, and ends. A table shows what
a rank asks of others in worlds of several sizes, and whether that grows faster than the logarithm.

  --world      sizes of the worlds (default: 8,32,128,256; minutes each on two cores)
  --checkpoints, --losses   how many (default: 20 and 5)

Exit codes: 0 all match, 1 a mismatch, or costs that grow too fast, 2 wrong input.
"""
_LIFE = "--life"


def rehearse_verb(arguments: list[str]) -> None:
    """`tapir rehearse PRESET`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        if not arguments:
            raise InputError("name a preset, e.g. tapir rehearse paper_12b --world 1024")
        return
    if _LIFE in arguments:
        _rehearse_life([argument for argument in arguments if argument != _LIFE])
        return
    preset, *rest = arguments
    own, flags = _own_flags(rest)
    world = _number(own, "--world", 0)
    jobs = _number(own, "--jobs", os.cpu_count() or 1)
    stage = own.get("--stage", "")
    made = rehearse_presets(preset, stage, flags, world, jobs, _device(own), _show)
    for name, reason in made.refused.items():
        LOG.error("%s was not rehearsed:\n%s", name, reason)
    if "--json" in own:
        rows = [{**to_json(one), "matches": one.matches} for one in made.rehearsals]
        whole = {"matches": made.matches, "rehearsals": rows, "refused": made.refused}
        print_json(whole if preset == ALL else rows[0])
    if made.refused or not made.matches:
        sys.exit(EXIT_WRONG_INPUT if made.matches else EXIT_FAILED)


def _rehearse_life(arguments: list[str]) -> None:
    own, others = _own_flags(arguments, ("--world", "--checkpoints", "--losses"))
    if others:
        raise InputError(f"{others[0]} does not go with {_LIFE}: see tapir rehearse --help")
    sizes = own.get("--world", ",".join(map(str, WORLDS))).split(",")
    worlds = sorted({_number({"--world": size}, "--world", 0) for size in sizes})
    defaults = LifePlan(world=worlds[0])
    checkpoints = _number(own, "--checkpoints", defaults.checkpoints)
    losses = _number(own, "--losses", defaults.losses)
    plans = [LifePlan(world=n, checkpoints=checkpoints, losses=losses) for n in worlds]
    check([problem for plan in plans for problem in plan.problems()])
    lives = [live(plan) for plan in plans]
    print("\n".join(table(lives)))
    problems = too_fast(lives)
    for problem in problems:
        LOG.error("grows faster than the logarithm of the world: %s", problem)
    if "--json" in own:
        print_json(facts(lives))
    if problems:
        sys.exit(EXIT_FAILED)


def _show(done: Rehearsal) -> None:
    print("\n".join(done.lines()), flush=True)


def _own_flags(
    arguments: list[str], named: Sequence[str] = ("--world", "--stage", "--device", "--jobs")
) -> tuple[dict[str, str], list[str]]:
    """Split into this verb's flags and the preset's."""
    own: dict[str, str] = {}
    rest = list(arguments)
    flags: list[str] = []
    while rest:
        name, separator, value = rest.pop(0).partition("=")
        if name == "--json":
            own[name] = ""
        elif name in named:
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
        raise InputError(f"{name} {text!r} is not a positive whole number up to {MOST_RANKS:,}")
    return number
