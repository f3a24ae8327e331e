"""Orders of a pipeline's passes, and what each of them asks for; imports no torch."""

from typing import Literal

Schedule = Literal["1f1b", "interleaved", "zero-bubble"]


def whole_rounds(micro_batches: int, stages: int) -> bool:
    """True if torch's interleaved and zero-bubble schedules take this number of micro-batches."""
    return micro_batches % max(1, micro_batches // stages) == 0


def schedule_problems(
    schedule: Schedule, chunks: int, stages: int, micro_batches: int, layers: int
) -> list[str]:
    """What a pipeline of these stages on torch's own stack cannot do; 1 = there is none."""
    if stages == 1:
        return _without_stages(schedule, chunks)
    problems = []
    if chunks < 1 or (schedule, chunks > 1) in (("1f1b", True), ("interleaved", False)):
        problems.append(
            f"engine.virtual_stages={chunks} does not go with engine.schedule={schedule}; "
            "interleaved takes 2 or more, zero-bubble 1 or more, 1f1b 1"
        )
    elif chunks > 1 and chunks * stages > layers:
        most = layers // stages
        problems.append(
            f"engine.virtual_stages={chunks} on {stages} stages are {chunks * stages} chunks of "
            f"layers, more than {layers} layers; try "
            + (
                f"--engine.virtual-stages {most}"
                if most > 1
                else "--engine.schedule 1f1b --engine.virtual-stages 1"
            )
        )
    few = schedule == "1f1b" and micro_batches < stages
    if few or not whole_rounds(micro_batches, stages):
        problems.append(
            f"engine.gradient_accumulation_steps={micro_batches} does not go with "
            f"engine.schedule={schedule} on {stages} stages; try "
            f"{stages * max(1, micro_batches // stages)}"
        )
    return problems


def _without_stages(schedule: Schedule, chunks: int) -> list[str]:
    """A schedule needs an engine and a mesh that have stages."""
    if (schedule, chunks) == ("1f1b", 1):
        return []
    return [
        f"engine.schedule={schedule} and engine.virtual_stages={chunks} are of pipelines on "
        "torch's own stack; use --engine.name torch with 2 or more --mesh.pipeline, or "
        "--engine.schedule 1f1b --engine.virtual-stages 1"
    ]


def split_problems(schedule: Schedule, recompute: bool, gpu: bool = False) -> list[str]:
    """What does not survive a backward pass in two halves."""
    if schedule != "zero-bubble":
        return []
    problems = []
    if recompute:
        problems.append(
            "engine.schedule=zero-bubble splits the backward pass, and would recompute each block "
            "for every linear (pytorch 136766); use --engine.no-recompute"
        )
    if gpu:
        problems.append(
            "engine.schedule=zero-bubble splits the backward pass, which compiled attention on "
            "GPUs does not survive (pytorch 161904); use --engine.schedule interleaved "
            "--engine.virtual-stages 2"
        )
    return problems
