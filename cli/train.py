"""The verb train; imports no torch, which only ranks need."""

from collections.abc import Mapping

from cluster.launcher import call_target
from core.errors import InputError, did_you_mean
from core.flags import parse_over
from training.launch import train_stage
from training.presets import PRESETS


def train(arguments: list[str]) -> None:
    """`tapir train STAGE PRESET [flags]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_train_help())
        if not arguments:
            raise InputError("name a stage and a preset, e.g. tapir train prior tiny")
        return
    stage, *rest = arguments
    _choose("stage", stage, PRESETS)
    if not rest or rest[0].startswith("-"):
        rest = ["tiny", *rest]
    preset, *flags = rest
    _choose(f"{stage} preset", preset, PRESETS[stage])
    function = PRESETS[stage][preset]
    settings = parse_over(function(), flags, f"train {stage} {preset}", function.__doc__)
    if stage == "bpe":
        call_target("training.tokenizer:train_tokenizer", settings)
    else:
        train_stage(stage, settings)


def _choose(what: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        hint = did_you_mean(name, known)
        raise InputError(f"there is no {what} {name!r}{hint} (known: {', '.join(known)})")


def _train_help() -> str:
    rows = [
        f"  tapir train {stage:<5} {preset:<10} {function.__doc__}"
        for stage, presets in PRESETS.items()
        for preset, function in presets.items()
    ]
    return (
        "usage: tapir train STAGE PRESET [flags]\n\n"
        + "\n".join(rows)
        + "\n\nEvery field of a preset is a flag: tapir train prior tiny --help. Ranks are\n"
        "spawned for the preset's mesh, or joined under torchrun and mpirun. The same\n"
        "command resumes."
    )
