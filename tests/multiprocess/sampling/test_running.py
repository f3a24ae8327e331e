"""A running batch on tensor ranks or pipeline stages draws the pictures of one process."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from generation.sampling import draw as choosing
from generation.sampling.decoder import Decoder
from generation.sampling.load_prior import load_local_prior
from generation.sampling.running import RunningBatch
from models.config import PriorConfig
from parallel.config import MeshConfig
from parallel.mesh import Mesh, build_mesh
from parallel.world import join_world, leave_world
from tests.harness import run_world
from tests.multiprocess.test_sampling import MODERN, write_prior
from tests.unit.generation.test_running import alone, candidates, story
from tests.unit.models.test_models import CONFIG

CASES: list[tuple[PriorConfig, float]] = [
    (replace(CONFIG, layers=3, conv_kernel=3), choosing.CLOSE),
    (MODERN, 0.3),
]
"""Priors, and how close codes are near ties: of the second, most are drawn again."""


def decode(payload: str) -> None:
    """A rank: rank 0 decides, the others follow."""
    body = json.loads(payload)
    world = join_world()
    mesh = build_mesh(MeshConfig(tensor=body["tensor"], pipeline=body["pipeline"]), world)
    results = []
    for prior, (config, close) in zip(body["priors"], CASES, strict=True):
        choosing.CLOSE = close
        batch = RunningBatch(Decoder(load_local_prior(Path(prior), None, mesh)[0]), 5)
        assert len(batch._lanes) == body["pipeline"]
        if world.rank > 0:
            batch.follow()
        else:
            results.append(story(batch, candidates(config)))
            batch.close()
    Path(body["out"], f"result-{world.rank}.json").write_text(json.dumps(results))
    leave_world(world)


@pytest.mark.world
@pytest.mark.parametrize("tensor,pipeline", [(2, 1), (1, 2)], ids=["TP2", "PP2"])
def test_ranks_draw_the_pictures_of_one_process(tensor: int, pipeline: int, tmp_path: Path) -> None:
    folders = [tmp_path / f"prior-{i}" for i in range(len(CASES))]
    for folder, (config, _) in zip(folders, CASES, strict=True):
        write_prior(folder, config)
    mesh = {"tensor": tensor, "pipeline": pipeline}
    body = {"priors": [str(folder) for folder in folders], "out": str(tmp_path), **mesh}
    drawn, none = run_world(f"{__name__}:decode", body, 2)
    assert none == []
    for codes, folder, (config, _) in zip(drawn, folders, CASES, strict=True):
        one = Decoder(load_local_prior(folder, None, Mesh())[0])
        assert codes == alone(one, candidates(config))
