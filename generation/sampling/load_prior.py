"""Load one rank's layers for decoding from a run's weights, which any mesh may have written."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from core.config import check, from_json
from generation.sampling.decoder import LocalPrior
from generation.sampling.pipeline import Leader, Neighbours, Pipeline, WorldLeader, least_of
from models.config import PriorConfig
from models.prior import prior_layers
from parallel.mesh import Mesh
from parallel.pipelines.balance import stage_layers
from parallel.placement import tie
from training.export.weights import fill, open_model


def cut_problems(config: PriorConfig, tensor: int, stages: int) -> list[str]:
    """Check TP <= heads and PP <= layers."""
    problems = []
    if tensor > config.heads:
        problems.append(f"--tensor {tensor} is more than the prior's {config.heads} heads")
    layers = config.layers + 2  # with embedding and head
    if stages > layers:
        problems.append(f"--pipeline {stages} is more than the prior's {layers} layers")
    return problems


def load_local_prior(
    folder: Path, step: int | None, mesh: Mesh
) -> tuple[LocalPrior, dict[str, Any]]:
    """This rank's layers of the prior in a run folder, and the prior's facts.

    Raises: ConfigError if the mesh does not fit; InputError, CorruptError as `open_model`.
    """
    saved = open_model(folder, "prior", step)
    config = from_json(PriorConfig, saved.config)
    layers = prior_layers(config, 0, mesh.shared)
    stages = mesh.pipeline.size
    check(cut_problems(config, mesh.tensor.size, stages))
    mine = stage_layers(layers, mesh.pipeline.rank, stages)
    built = nn.ModuleDict({layer.name: layer.build() for layer in mine})
    tie(built)  # type: ignore[arg-type]
    fill(built, saved)
    neighbours = Pipeline(mesh.pipeline) if stages > 1 else Neighbours()
    part = LocalPrior(
        layers=dict(built.eval().to(mesh.world.device).items()),
        config=config,
        tensor=mesh.shared,
        neighbours=neighbours,
        least=partial(least_of, mesh.world),
        lead=WorldLeader(mesh.world) if mesh.world.size > 1 else Leader(),
    )
    return part, saved.facts
