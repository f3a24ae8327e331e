"""Resolves `auto` precisions of the engine, once per run and equally on all ranks.

On CPUs bf16 can be far slower than fp32 (without bf16 instructions) or far faster (with AMX tiles);
oneDNN's fp32 kernels can be faster than MKL's (AMD) or slower (Intel). So each rank times one
matmul per precision. Its size is fixed and makes close results rare, so that a machine gives the
same answer under load. A resumed run keeps its precisions (docs/decisions/017).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from checkpoint.reader import CheckpointReader, finished_steps
from core.errors import CheckpointError, CorruptError, InputError
from core.log import LOG
from core.storage.store import open_store
from parallel.config import LEAST_GAIN
from parallel.precision import engine_numerics, medium_is_accurate, set_numerics
from parallel.world import World
from training.config import PriorTrain, StageConfig
from training.run.config import config_of

S = TypeVar("S", bound=StageConfig)
SIDE, ROUNDS = 256, 6
"""Side of the square matrices, and number of timed matmuls; the minimum counts."""
MEDIUM = "fp32 medium"
"""fp32 by the kernels of `engine.matmul_precision medium`, where they are accurate."""
PRECISIONS = ("fp32", MEDIUM, "bf16", "fp16")


def settle_precision(settings: S, world: World) -> S:
    """Replace `auto` precisions in the settings; collective over all ranks.

    On GPUs matmul_precision stays `auto`, which means `highest` there.
    """
    engine = settings.engine
    names = [name for name in ("precision", "matmul_precision") if vars(engine)[name] == "auto"]
    if world.device.type != "cpu":
        names = [name for name in names if name == "precision"]
    if not names:
        return settings
    engine_numerics(world.device, engine)
    rates = _rates(settings, world.device)
    begun = _begun_with(settings) if world.rank == 0 else {}
    ranks = [json.loads(text) for text in world.gather_text(json.dumps(rates))]
    slowest, here = _slowest(ranks), fastest(ranks)
    begun, here = json.loads(world.gather_text(json.dumps([begun, here]))[0])
    for name in names:
        kept = begun.get(name, "")
        if world.rank == 0:
            _tell(name, kept, here[name], slowest if world.device.type == "cpu" else {})
        engine = replace(engine, **{**vars(engine), name: kept or here[name]})
    return replace(settings, engine=engine)


def fastest(ranks: Sequence[dict[str, float]]) -> dict[str, str]:
    """The precisions with the highest rate of the slowest rank, among those that all ranks support.

    `ranks` are operations per second by precision. 16 bits cost accuracy, and oneDNN's fp32 kernels
    slow down the small matmuls of attention, so both must be LEAST_GAIN times faster.
    """
    slowest = _slowest(ranks)

    def gaining(names: Sequence[str], least: str) -> str:
        known = [name for name in names if name in slowest]
        best = max(known, key=slowest.__getitem__, default="")
        return best if best and slowest[best] >= LEAST_GAIN * slowest[least] else least

    plain = gaining([MEDIUM], "fp32")
    best = gaining(["bf16", "fp16"], plain)
    matmul = "medium" if plain == MEDIUM else "highest"
    return {"precision": "fp32" if best == plain else best, "matmul_precision": matmul}


def _slowest(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Operations per second of the slowest rank, by precision that all ranks support."""
    shared = [name for name in PRECISIONS if all(name in rates for rates in ranks)]
    return {name: min(rates[name] for rates in ranks) for name in shared}


def cpu_rates() -> dict[str, float]:
    """Operations per second of a matmul on this rank's threads, by precision, timed in turns.

    One thread is timed by its CPU seconds, which other processes do not lengthen.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    draws = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(SIDE, SIDE, generator=draws, device="cpu")
    candidates = {"fp32": ("highest", x), "bf16": ("highest", x.bfloat16())}
    if medium_is_accurate():
        candidates[MEDIUM] = ("medium", x)
    least = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS):
        for name, (matmul, a) in candidates.items():
            set_numerics(x.device, matmul)
            began = clock()
            torch.mm(a, a)
            least[name] = min(least[name], clock() - began)
    return {name: 2 * SIDE**3 / seconds for name, seconds in least.items()}


def _rates(settings: StageConfig, device: torch.device) -> dict[str, float]:
    """Rate by precision; GPUs are not timed: 16 bits are faster on all that support them."""
    if device.type == "cpu":
        return cpu_rates()
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return {"fp32": 1.0, "bf16": 8.0, "fp16": 4.0}
    return {"fp32": 1.0, **({"fp16": 4.0} if isinstance(settings, PriorTrain) else {})}


def _begun_with(settings: StageConfig) -> dict[str, str]:
    """The precisions of the run's newest checkpoint, else of its folder; empty for a new run."""
    store = open_store(settings.checkpoint.to or str(settings.out / "checkpoints"))
    for step in reversed(finished_steps(store)):
        try:
            return _resolved(CheckpointReader(store, f"step-{step}").facts["config"])
        except (CorruptError, CheckpointError):
            continue  # reported when the run resumes
    try:
        return _resolved(config_of(settings.out))
    except (InputError, KeyError, TypeError):
        return {}


def _resolved(config: dict[str, Any]) -> dict[str, str]:
    """The precisions in a stored config that are not `auto`."""
    known = {"precision": ("fp32", "bf16", "fp16"), "matmul_precision": ("highest", "medium")}
    engine = config["engine"]
    return {name: engine[name] for name, values in known.items() if engine.get(name) in values}


def _tell(name: str, kept: str, here: str, rates: dict[str, float]) -> None:
    """Log the chosen precision, unless it is the default, with the timed rates."""
    figures = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in rates.items())
    timed = f" (a matmul here: {figures})" if rates else ""
    if not kept and here != "highest":
        LOG.info("engine.%s auto: %s%s", name, here, timed)
    elif kept and kept != here:
        LOG.warning(
            "engine.%s auto: the run was begun in %s, which is kept; here %s is faster%s: "
            "--engine.%s %s changes it",
            *(name, kept, here, timed, name, here),
        )
