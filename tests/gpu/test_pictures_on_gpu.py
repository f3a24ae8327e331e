"""Candidates and scores on a GPU equal the CPU's except for near ties and rounding."""

from pathlib import Path

import numpy as np
import torch

from core.workers import JobWorker
from data_pipeline.evaluation_sets import open_evaluation
from generation.config import DrawSettings, ScoreConfig
from generation.evaluation.open_score import open_job
from generation.sampling.decoder import Decoder, LocalPrior
from generation.text_to_image import open_studio
from parallel.device import CPU
from parallel.mesh import Mesh
from parallel.world import World
from tests.unit.finished import write_models
from tests.unit.generation.test_sampling import draw, keys_of
from tests.unit.layouts import write_coco
from tests.unit.models.test_models import CONFIG, trained_like


def test_candidates_are_those_of_the_cpu(device: torch.device) -> None:
    """A draw with a near tie may differ: one of twelve at most."""
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(0, 30, (2, CONFIG.text_length), generator=draws)
    codes = []
    for place in (CPU, device):
        decoder = Decoder(LocalPrior(layers=trained_like().to(place), config=CONFIG))
        codes.append(draw(decoder, text, keys_of(2, 6), DrawSettings(), None).flatten(0, 1))
    assert len(codes[0].unique(dim=0)) > 6
    assert int((codes[0] != codes[1]).any(1).sum()) <= 1


def test_scores_are_those_of_the_cpu(tmp_path: Path, device: torch.device) -> None:
    """FID subtracts squares of features: a hundred times their bound in fp32."""
    data = f"coco:{write_coco(tmp_path / 'coco', 8)}"
    captions = [caption.text for caption in open_evaluation(data).captions]
    models = write_models(tmp_path, captions)
    config = ScoreConfig(candidates=2, captions=10, block=5, radii=(0.0, 1.0))
    values = []
    for number, place in enumerate((CPU, device)):
        mesh = Mesh(world=World(device=place))
        given = {"inception": None, "overlap": None, "out": tmp_path / str(number)}
        job = open_job(data, models, config=config, device=place, **given)
        alone = JobWorker(number=0, count=1)
        scores = job.run(lambda mesh=mesh: open_studio(models, config.precision, mesh), alone)
        assert scores is not None
        values.append([row[name] for row in scores["rows"] for name in ("fid", "is")])
    assert np.isfinite(values).all() and np.allclose(*values, rtol=1e-3)
