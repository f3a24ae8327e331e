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

CONFIGS: list[PriorConfig] = [replace(CONFIG, layers=3, conv_kernel=3), MODERN]
CLOSE = (choosing.CLOSE, 0.3)
"""As is, and with most draws made again from canonical logits."""


def decode(payload: str) -> None:
    """A rank: rank 0 decides, the others follow."""
    body = json.loads(payload)
    world = join_world()
    mesh = build_mesh(MeshConfig(tensor=body["tensor"], pipeline=body["pipeline"]), world)
    results = []
    for prior in body["priors"]:
        decoder = Decoder(load_local_prior(Path(prior), None, mesh)[0])
        of = candidates(decoder.config)
        for seed, close in enumerate(CLOSE):
            choosing.CLOSE = close
            batch = RunningBatch(decoder, 5)
            assert len(batch._lanes) == body["pipeline"]
            if world.rank > 0:
                batch.follow()
                continue
            results.append(story(batch, of, seed))
            batch.close()
    Path(body["out"], f"result-{world.rank}.json").write_text(json.dumps(results))
    leave_world(world)


@pytest.mark.world
@pytest.mark.parametrize("tensor,pipeline", [(2, 1), (1, 2)], ids=["TP2", "PP2"])
def test_ranks_draw_the_pictures_of_one_process(tensor: int, pipeline: int, tmp_path: Path) -> None:
    folders = [tmp_path / f"prior-{i}" for i in range(len(CONFIGS))]
    for folder, config in zip(folders, CONFIGS, strict=True):
        write_prior(folder, config)
    mesh = {"tensor": tensor, "pipeline": pipeline}
    body = {"priors": [str(folder) for folder in folders], "out": str(tmp_path), **mesh}
    (drawn, none) = run_world(f"{__name__}:decode", body, 2)
    assert none == []
    for i, folder in enumerate(folders):
        one = Decoder(load_local_prior(folder, None, Mesh())[0])
        expected = alone(one, candidates(one.config))
        assert drawn[2 * i : 2 * i + 2] == [expected, expected]
