"""Opens the data and the models of the job of score_job.py."""

from pathlib import Path

import torch

from core.errors import InputError
from data_pipeline.evaluation_sets import open_evaluation
from data_pipeline.text.bpe import load_tokenizer
from generation.config import ModelPaths, ScoreConfig
from generation.evaluation.feature_extractors import ClipProxy, Network
from generation.evaluation.overlap_report import read_overlap
from generation.evaluation.score_job import ScoreJob
from generation.ranking import TapirRanker, open_ranker
from models.critics.inception import Inception
from parallel.device import CPU
from parallel.precision import set_numerics
from training.export.tokenizers import facts_in
from training.export.weights import open_model


def digests(models: ModelPaths, ranks: bool = True) -> dict[str, str]:
    """Digests of the models by role; without a CLIP if nothing `ranks`."""
    images = facts_in(models.dvae)
    clip = {}
    if ranks:
        clip["clip"] = open_ranker(models.clip, models.bpe, pixels=images.pixels).digest
    return {
        "prior": open_model(models.prior, "prior", models.step).digest,
        "dvae": images.digest,
        **clip,
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
    model_digests: dict[str, str] | None = None,
) -> ScoreJob:
    """Open the data and the models and check them before anything is drawn.

    `device` is the network's; `model_digests` are taken here if they are not known.
    Raises: InputError if something is missing or does not fit.
    """
    numerics = set_numerics(device, deterministic=False)  # as `open_studio` does
    model_digests = model_digests or digests(models)
    pixels = facts_in(models.dvae).pixels
    evaluation = open_evaluation(data)
    captions = [caption.text for caption in evaluation.choose(config.captions, config.seed)]
    network = open_network(inception, models, captions, device)
    left_out = read_overlap(overlap, evaluation) if overlap is not None else None
    return ScoreJob(evaluation, model_digests, pixels, network, config, out, numerics, left_out)


def open_network(
    inception: Path | None, models: ModelPaths, captions: list[str], device: torch.device
) -> Network:
    """Inception, or without its weights the run's CLIP with these captions as classes.

    Raises: InputError if the weights are missing or the CLIP is not Tapir's.
    """
    if inception is not None:
        return Inception(inception, device)
    ranker = open_ranker(models.clip, models.bpe, device)
    if not isinstance(ranker, TapirRanker):
        raise InputError(
            f"the proxy for Inception is a CLIP that Tapir trained, {models.clip} is none; "
            "give --inception, or such a CLIP"
        )
    return ClipProxy(ranker.clip, ranker.digest, ranker.tokenizer, captions)
