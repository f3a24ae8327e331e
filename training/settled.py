"""`engine.precision auto`: settled before a run's first step, the same on every rank, then kept.

On CPUs bf16 is 80 times slower than fp32 where no instruction multiplies it (AVX2), and up to 8
times faster where tiles do (AMX); between them lie CPUs that have such instructions and are faster
without. So ranks time one matmul in both. Its size is fixed: far from a tie, so that the same
machine answers alike, busy or not. What a run has begun with it keeps (docs/decisions/017).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from checkpoint.reader import CheckpointReader, finished_steps
from core.errors import CheckpointError, CorruptError, InputError
from core.log import LOG
from core.store import open_store
from parallel.config import BF16_GAIN
from parallel.precision import engine_numerics
from parallel.world import World
from training.config import PriorTrain, StageConfig
from training.run_config import config_of

S = TypeVar("S", bound=StageConfig)
SIDE, ROUNDS = 256, 4
"""Of the square matrices, and how often they are multiplied: the least time counts."""
PRECISIONS = ("fp32", "bf16", "fp16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def settle_precision(settings: S, world: World) -> S:
    """The settings with a precision in place of `auto`; all ranks call it together."""
    if settings.engine.precision != "auto":
        return settings
    engine_numerics(world.device, settings.engine)
    rates = _rates(settings, world.device)
    kept = _begun_with(settings) if world.rank == 0 else ""
    said = [json.loads(text) for text in world.gather_text(json.dumps([kept, rates]))]
    kept, here = said[0][0], fastest([rates for _, rates in said])
    if world.rank == 0:
        _tell(kept, here, said[0][1] if world.device.type == "cpu" else {})
    engine = replace(settings.engine, precision=kept or here)  # type: ignore[arg-type]
    return replace(settings, engine=engine)


def fastest(ranks: Sequence[dict[str, float]]) -> str:
    """The precision in which the slowest rank is fastest, of those that all can compute in.

    `ranks` are operations a second of each. 16 bits cost accuracy: they must gain BF16_GAIN.
    """
    shared = [name for name in PRECISIONS if all(name in rates for rates in ranks)]
    slowest = {name: min(rates[name] for rates in ranks) for name in shared}
    best = max(shared[1:], key=lambda name: slowest[name], default="fp32")
    return best if slowest[best] >= BF16_GAIN * slowest["fp32"] else "fp32"


def cpu_rates() -> dict[str, float]:
    """Operations a second of a matmul on this rank's threads, in turns."""
    draws = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(SIDE, SIDE, generator=draws, device="cpu")
    least = dict.fromkeys(_DTYPES, float("inf"))
    for _ in range(ROUNDS):
        for name, dtype in _DTYPES.items():
            a = x.to(dtype)
            began = time.perf_counter()
            torch.mm(a, a)
            least[name] = min(least[name], time.perf_counter() - began)
    return {name: 2 * SIDE**3 / seconds for name, seconds in least.items()}


def _rates(settings: StageConfig, device: torch.device) -> dict[str, float]:
    """Of each precision; GPUs are not timed: 16 bits are faster on all that have units for them."""
    if device.type == "cpu":
        return cpu_rates()
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return {"fp32": 1.0, "bf16": 8.0, "fp16": 4.0}
    return {"fp32": 1.0, **({"fp16": 4.0} if isinstance(settings, PriorTrain) else {})}


def _begun_with(settings: StageConfig) -> str:
    """The precision of the run's newest checkpoint, else of its folder; empty for a new run."""
    store = open_store(settings.checkpoint.to or str(settings.out / "checkpoints"))
    for step in reversed(finished_steps(store)):
        try:
            config = CheckpointReader(store, f"step-{step}").facts["config"]
            return str(config["engine"]["precision"])
        except (CorruptError, CheckpointError):
            continue  # which is told when the run resumes
    try:
        found = str(config_of(settings.out)["engine"]["precision"])
    except (InputError, KeyError, TypeError):
        return ""
    return found if found in PRECISIONS else ""


def _tell(kept: str, here: str, rates: dict[str, float]) -> None:
    """Say what was settled, with the rates if they were timed."""
    figures = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    timed = f" (a matmul here: {figures})" if rates else ""
    if not kept:
        LOG.info("engine.precision auto: %s%s", here, timed)
    elif kept != here:
        LOG.warning(
            "engine.precision auto: the run was begun in %s, which is kept; here %s is faster%s: "
            "--engine.precision %s changes it",
            *(kept, here, timed, here),
        )
