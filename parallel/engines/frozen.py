"""Parameters that are not trained: no gradient, no moments, no reduction.

A frozen parameter has `requires_grad` off. It is marked when its layer is built, so that engines
and plans read it from the modules that they build anyway.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import nn

from core.errors import ConfigError
from core.log import LOG
from parallel.engines.protocol import Layer, Program
from parallel.pipelines.balance import stage_layers
from parallel.placement import placement_of


def freeze(program: Program, pattern: str) -> Program:
    """The program with the parameters frozen whose global name a regular expression is found in.

    An empty pattern freezes none.
    """
    if not pattern:
        return program
    expression = re.compile(pattern)
    layers = [replace(layer, build=partial(_frozen, layer, expression)) for layer in program.layers]
    return replace(program, layers=layers)


def _frozen(layer: Layer, expression: re.Pattern[str]) -> nn.Module:
    module = layer.build()
    for name, parameter in module.named_parameters():
        if expression.search(placement_of(parameter).tied_to or f"{layer.name}.{name}"):
            parameter.requires_grad_(False)
    return module


def trained(names: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, in the same order."""
    return {name: parameter for name, parameter in names.items() if parameter.requires_grad}


def check_frozen(program: Program, pattern: str, stages: int) -> None:
    """Check that the expression freezes something, and that all of `stages` have a parameter left.

    Builds the layers without values, on every rank alike, and logs how much is trained.
    Raises: ConfigError.
    """
    if not pattern and program.saves_frozen:
        return
    with torch.device("meta"):
        built = [dict(layer.build().named_parameters()) for layer in program.layers]
    known: dict[str, nn.Parameter] = {}
    for layer, held in zip(program.layers, built, strict=True):
        for name, parameter in held.items():  # copies have their owner's name
            known.setdefault(placement_of(parameter).tied_to or f"{layer.name}.{name}", parameter)
    if problem := absent_problem(list(known), pattern):
        raise ConfigError(problem)
    trains = [bool(trained(held)) for held in built]
    if problem := stage_problem(trains, [layer.cost for layer in program.layers], stages):
        raise ConfigError(problem)
    sizes = [prod(placement_of(p).shape) for p in trained(known).values()]
    LOG.info("%s parameters are trained, in %d tensors", f"{sum(sizes):,}", len(sizes))


def absent_problem(names: Sequence[str], pattern: str) -> str:
    """Why an expression freezes nothing: it is found in no parameter's name; else empty."""
    if not pattern or any(re.search(pattern, name) for name in names):
        return ""
    return (
        f"freeze={pattern!r} is found in no parameter's name; there are {', '.join(names[:5])} "
        f"... {names[-1]}; try e.g. --freeze embedding, or --freeze '^block00[0-3]'"
    )


def stage_problem(trains: Sequence[bool], costs: Sequence[int], stages: int) -> str:
    """Why a pipeline cannot train: a stage whose layers are all frozen; empty if it can.

    `trains`: for each layer, whether it has a parameter to train.
    """
    if not any(trains):
        return "freeze leaves no parameter to train; narrow the expression"
    rows = [Layer(name=str(i), build=nn.Identity, cost=cost) for i, cost in enumerate(costs)]
    for stage in range(stages):
        if not any(trains[int(row.name)] for row in stage_layers(rows, stage, stages)):
            return (
                f"stage {stage} of {stages} of the pipeline has no parameter to train, with this "
                "freeze and lora.rank, and each stage has an optimiser; use a smaller "
                "--mesh.pipeline"
            )
    return ""
