"""`tapir score DATA`: opens data and models, and is one worker of the job of score_job.py."""

import functools
from pathlib import Path
from typing import Any

import torch

from core.config import check
from core.errors import InputError
from core.files.out_folder import refuse_others_folder
from core.workers import job_worker_of
from data_pipeline.evaluation_sets import open_evaluation
from data_pipeline.text.bpe import load_tokenizer
from generation.config import ModelPaths, ScoreConfig
from generation.evaluation.feature_extractors import ClipProxy, Inception, Network
from generation.evaluation.overlap_report import read_overlap
from generation.evaluation.score_job import ScoreJob
from generation.ranking import TapirRanker, open_ranker
from generation.text_to_image import open_studio
from parallel.device import CPU
from parallel.mesh import own_mesh
from parallel.precision import set_numerics
from training.export.weights import open_model


def score_models(
    models: ModelPaths,
    data: str,
    inception: Path | None,
    overlap: Path | None,
    config: ScoreConfig,
    out: Path,
    worker: str,
) -> dict[str, Any]:
    """Be one worker of the score job; return the scores when all blocks are done.

    Raises: ConfigError with every problem of the settings; InputError if OUT is another's folder.
    """
    check(config.problems())
    refuse_others_folder(out, "score")
    member = job_worker_of(worker)
    mesh = own_mesh(member.number)
    job = open_job(data, models, inception, overlap, config, out, mesh.world.device)
    opened = functools.partial(open_studio, models, config.precision, mesh, batch=config.batch)
    return job.run(opened, member)


def digests(models: ModelPaths) -> dict[str, str]:
    """Digests of the models by role."""
    dvae = open_model(models.dvae, "dvae")
    pixels = int(dvae.config["pixels"])
    return {
        "prior": open_model(models.prior, "prior", models.step).digest,
        "dvae": dvae.digest,
        "clip": open_ranker(models.clip, models.bpe, pixels=pixels).digest,
        "tokenizer": load_tokenizer(models.bpe)[1],
    }


def open_job(
    data: str,
    models: ModelPaths,
    inception: Path | None,
    overlap: Path | None,
    config: ScoreConfig,
    out: Path,
    device: torch.device = CPU,
) -> ScoreJob:
    """Open the data and the models and check them before anything is drawn.

    `device` is the network's. Raises: InputError if something is missing or does not fit.
    """
    numerics = set_numerics(device, deterministic=False)  # as `open_studio` does
    model_digests = digests(models)
    pixels = int(open_model(models.dvae, "dvae").config["pixels"])
    evaluation = open_evaluation(data)
    network: Network
    if inception is not None:
        network = Inception(inception, device)
    else:
        captions = [caption.text for caption in evaluation.choose(config.captions, config.seed)]
        ranker = open_ranker(models.clip, models.bpe, device)
        if not isinstance(ranker, TapirRanker):
            raise InputError(
                f"the proxy for Inception is a CLIP that Tapir trained, {models.clip} is none; "
                "give --inception, or such a CLIP"
            )
        network = ClipProxy(ranker.clip, ranker.digest, ranker.tokenizer, captions)
    left_out = read_overlap(overlap, evaluation) if overlap is not None else None
    return ScoreJob(evaluation, model_digests, pixels, network, config, out, numerics, left_out)
