"""Faults that are planted in ranks; each is a function that the rank's payload names.

A plant changes the code of its own process only, then the ordinary rank runs.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import models.prior
import training.trainer
import training.worker
from cluster.supervisor import supervise
from core.config import to_json
from parallel.engines.registry import modules_of
from training.config import PriorTrain
from training.launch import PRELOAD

Facts = dict[str, Any]


def train_with(plant: str, settings: PriorTrain, **facts: Any) -> None:
    """Train under the supervisor, with a plant in each rank."""
    body = {"stage": "prior", "settings": to_json(settings), "plant": plant, "facts": facts}
    engines = modules_of(settings.engine.name, settings.mesh.world > settings.mesh.data)
    preload = [*PRELOAD, *engines, "tests.faults.plants"]
    ranks, reports = settings.mesh.world, settings.out / "hang"
    supervise(
        "tests.faults.plants:run", json.dumps(body), ranks, preload, settings.supervisor, reports
    )


def run(payload: str) -> None:
    """Plant, then be an ordinary rank."""
    body = json.loads(payload)
    PLANTS[body["plant"]]({**body["facts"], "out": body["settings"]["out"]})
    training.worker.run(payload)


def changed(settings: PriorTrain, **parts: dict[str, Any]) -> PriorTrain:
    """Settings with some fields of some parts replaced."""
    new = {
        name: dataclasses.replace(getattr(settings, name), **fields)
        for name, fields in parts.items()
    }
    return dataclasses.replace(settings, **new)


def _before_step(act: Callable[[Any, int], None]) -> None:
    """Call `act(run, step)` before each step; the first step is 1."""
    step = training.trainer.Run.one_step

    def one_step(run: Any, records: Any) -> Any:
        act(run, run.step + 1)
        return step(run, records)

    training.trainer.Run.one_step = one_step  # type: ignore[method-assign]


def _scale_loss(factor: Callable[[Any], float]) -> None:
    """Multiply the loss by `factor(run)`, evaluated before each step."""
    current = [1.0]

    def act(run: Any, _step: int) -> None:
        current[0] = factor(run)

    _before_step(act)
    whole = models.prior.prior_loss

    def prior_loss(*arguments: Any, **names: Any) -> Any:
        figures = whole(*arguments, **names)
        return {**figures, "loss": figures["loss"] * current[0]} if current[0] != 1 else figures

    models.prior.prior_loss = prior_loss


def _once(facts: Facts) -> bool:
    """True the first time in this run folder, on one rank."""
    try:
        os.close(os.open(Path(facts["out"], "planted"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def nothing(_facts: Facts) -> None:
    """An ordinary rank."""


def spike(facts: Facts) -> None:
    """The loss of some batches (their positions in the epoch) is 10,000 times too large."""
    _scale_loss(lambda run: 1e4 if run.feed.state.step - 1 in facts["batches"] else 1.0)


def not_finite(facts: Facts) -> None:
    """At one step, the loss of one rank is not a number."""
    _scale_loss(
        lambda run: (
            float("nan") if run.step + 1 == facts["at"] and run.world.rank == facts["rank"] else 1.0
        )
    )


def crash(facts: Facts) -> None:
    """The same step raises on every start."""

    def act(run: Any, step: int) -> None:
        if step == facts["at"] and run.world.rank == 1:
            raise ValueError("planted crash")

    _before_step(act)


def freeze(facts: Facts) -> None:
    """One rank sleeps for ever, once."""

    def act(run: Any, step: int) -> None:
        if step == facts["at"] and run.world.rank == facts["rank"] and _once(facts):
            time.sleep(10**6)

    _before_step(act)


def skip_collective(facts: Facts) -> None:
    """One rank leaves out one all-reduce, or (`size`) sends another size, once."""

    def act(run: Any, step: int) -> None:
        if step != facts["at"] or run.world.rank != facts["rank"] or not _once(facts):
            return
        if facts.get("size"):
            dist.all_reduce(torch.ones(facts["size"]))
        else:
            dist.all_reduce(torch.ones(1), group=run.world.aside)

    _before_step(act)


def flip(facts: Facts) -> None:
    """One bit of a weight of one rank flips, once."""

    def act(run: Any, step: int) -> None:
        if step == facts["at"] and run.world.rank == facts["rank"] and _once(facts):
            weight = next(iter(run.engine.replicas()[0][0]))
            with torch.no_grad():
                weight.view(torch.int32).view(-1)[3] ^= 1 << 20

    _before_step(act)


def slow(facts: Facts) -> None:
    """One rank takes longer for each step than its peers."""

    def act(run: Any, _step: int) -> None:
        if run.world.rank == facts["rank"]:
            time.sleep(facts["seconds"])

    _before_step(act)


def errors(facts: Facts) -> None:
    """Before one step, every replica's error buffers become their mean times a factor."""

    def act(run: Any, step: int) -> None:
        if step == facts["at"]:
            compressor = run.engine._compressor
            for batch in compressor._powersgd._batches:
                dist.all_reduce(batch.error, group=compressor._group.handle)
                batch.error *= facts["factor"] / compressor._group.size

    _before_step(act)


def clock(facts: Facts) -> None:
    """The wall clock jumps back a day, later forward two; steps are slow meanwhile."""
    real = time.time

    def act(_run: Any, step: int) -> None:
        shift = {facts["at"]: -86_400, facts["back"]: 86_400}.get(step)
        if shift is not None:
            time.time = lambda: real() + shift  # type: ignore[assignment]
        if facts["at"] <= step < facts["back"]:
            time.sleep(facts["seconds"])

    _before_step(act)


PLANTS: dict[str, Callable[[Facts], None]] = {
    function.__name__: function
    for function in (
        nothing,
        spike,
        not_finite,
        crash,
        freeze,
        skip_collective,
        flip,
        slow,
        errors,
        clock,
    )
}
