"""Samples and scores on a device other than the CPU: the same codes and figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.workers import JobWorker
from data_pipeline.evaluation_sets import open_evaluation
from generation.config import DrawSettings, ScoreConfig
from generation.evaluation.open_score import open_job
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.running import RunningBatch
from generation.sampling.sampler import Prompt
from generation.text_to_image import open_studio
from models.prior import PAD
from parallel.device import CPU
from parallel.mesh import Mesh
from parallel.world import World
from tests.second_device import SECOND
from tests.unit.finished import write_models
from tests.unit.generation.test_running import candidates, story
from tests.unit.generation.test_sampling import draw, keys_of
from tests.unit.layouts import write_coco
from tests.unit.models.test_models import CONFIG, trained_like

pytestmark = pytest.mark.seconds

ALONE = JobWorker(number=0, count=1)


@pytest.mark.parametrize(
    "settings,batch", [({}, 128), ({"guidance": 2.0}, 128), ({"top_p": 0.8}, 2)]
)
def test_candidates_are_those_of_the_cpu(settings: dict[str, Any], batch: int) -> None:
    """With given rows, and with candidates whose near ties are drawn again."""
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(0, 30, (2, CONFIG.text_length), generator=draws)
    text[1, 4:] = PAD
    codes = torch.randint(0, 20, (CONFIG.image_length,), generator=draws)
    prompt = Prompt(codes=codes, kept=torch.arange(CONFIG.image_length) < CONFIG.grid + 2)
    results = []
    for device in (CPU, SECOND):
        layers: nn.ModuleDict = trained_like().to(device)
        decoder = Decoder(LocalPrior(layers=layers, config=CONFIG))
        assert decoder.device == device
        results.append(draw(decoder, text, keys_of(2, 3), DrawSettings(**settings), prompt, batch))
    assert torch.equal(*results)


def test_a_running_batch_draws_those_of_the_cpu() -> None:
    of, drawn = candidates(CONFIG, 3), []
    for device in (CPU, SECOND):
        part = LocalPrior(layers=trained_like().to(device), config=CONFIG)
        drawn.append(story(RunningBatch(Decoder(part), 4, lambda device: 10**9), of))
    assert drawn[0] == drawn[1]


def test_scores_are_those_of_the_cpu(tmp_path: Path) -> None:
    data = f"coco:{write_coco(tmp_path / 'coco', 8)}"
    captions = [caption.text for caption in open_evaluation(data).captions]
    models = write_models(tmp_path, captions)
    config = ScoreConfig(candidates=2, captions=10, block=5, radii=(0.0, 1.0))
    metrics = []
    for device in (CPU, SECOND):
        mesh = Mesh(world=World(device=device))
        given = {"inception": None, "overlap": None, "out": tmp_path / device.type}
        job = open_job(data, models, config=config, device=device, **given)
        scores = job.run(lambda mesh=mesh: open_studio(models, config.precision, mesh), ALONE)
        assert scores is not None
        metrics.append([row[name] for row in scores["rows"] for name in ("fid", "is")])
    assert np.isfinite(metrics).all() and np.allclose(*metrics, rtol=1e-5)
