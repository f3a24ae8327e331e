"""Warnings of a profile, each with a remedy."""

from collections.abc import Mapping

from training.config import StageConfig
from training.profiling.categories import BUBBLE, CHECKPOINT, DATA_WAIT, OTHER

_DATA, _BUBBLE, _SAVE, _PYTHON = 0.1, 0.15, 0.05, 0.1
"""Shares of the time above which there is a warning."""
_SLOW = 1.2
"""Ratio of a rank's own work to its peers' median above which it counts as slow."""


def warnings_for(
    settings: StageConfig, shares: Mapping[str, float], ratios: Mapping[int, float]
) -> list[str]:
    """Warnings by descending cost; `ratios` are ranks' own work over their peers' median."""
    candidates = [
        (shares[DATA_WAIT], _data_bound(settings, shares[DATA_WAIT])),
        (shares[BUBBLE], _bubble(settings, shares[BUBBLE])),
        (shares[CHECKPOINT], _held_up(settings, shares[CHECKPOINT])),
        (shares[OTHER], _python(shares[OTHER])),
        (max(ratios.values()) - 1, _slow_rank(ratios)),
    ]
    return [text for _, text in sorted(candidates, key=lambda row: -row[0]) if text]


def accumulate_to_halve(settings: StageConfig) -> int:
    """Number of micro-batches that halves the bubble of the 1F1B schedule.

    The bubble is (p - 1) / (m + p - 1) for p stages and m micro-batches; half of it needs
    2 m + p - 1. Returns the next number that divides a replica's batch, or 0 if there is none.
    """
    stages, micro = settings.mesh.pipeline, settings.engine.gradient_accumulation_steps
    replica = settings.loop.global_batch_size // max(settings.mesh.data, 1)
    least = 2 * micro + stages - 1
    return next((n for n in range(least, replica + 1) if replica % n == 0), 0)


def _data_bound(settings: StageConfig, share: float) -> str:
    if share <= _DATA:
        return ""
    loader = settings.loader
    flags = f"--loader.prefetch {2 * loader.prefetch} --loader.readers {2 * loader.readers}"
    cache = "" if loader.cache else ", and --loader.cache with a local folder"
    return (
        f"data-bound: {share:.0%} of the time is waiting for batches; for pictures try "
        f"--loader.workers {2 * loader.workers} (cores that are free), for a slow store {flags}"
        f"{cache}"
    )


def _bubble(settings: StageConfig, share: float) -> str:
    if share <= _BUBBLE:
        return ""
    micro = accumulate_to_halve(settings)
    least = 2 * settings.engine.gradient_accumulation_steps + settings.mesh.pipeline - 1
    more = f"--loop.global-batch-size {least * max(settings.mesh.data, 1)} " if not micro else ""
    advice = f"{more}--engine.gradient-accumulation-steps {micro or least}"
    return (
        f"bubble: {share:.0%} of the time the stages wait for one another; {advice} would about "
        "halve it, or use fewer stages"
    )


def _held_up(settings: StageConfig, share: float) -> str:
    if share <= _SAVE:
        return ""
    every = settings.checkpoint.every
    advice = f"--checkpoint.every {2 * every} would halve it"
    if not settings.checkpoint.async_save:
        advice = f"--checkpoint.async-save writes beside the training; {advice}"
    return f"saves hold training up for {share:.0%} of the time; {advice}"


def _python(share: float) -> str:
    if share <= _PYTHON:
        return ""
    return (
        f"{share:.0%} of the time is Python outside of the engine; log less often "
        "(--loop.log-every), compare replicas less often (--guard.compare-every), or look at a "
        "trace (--trace-next 5)"
    )


def _slow_rank(ratios: Mapping[int, float]) -> str:
    worst = max(ratios, key=lambda rank: ratios[rank])
    if ratios[worst] <= _SLOW:
        return ""
    return (
        f"rank {worst} takes {ratios[worst]:.2f} times its peers' time for its own work, and all "
        "others wait for it: look at its node (clocks, other processes, heat), or leave it out"
    )
