"""Draw candidates for held-out captions, measure them and write the report's pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from core.config import check
from core.files.atomic import canonical_json, write_atomic
from core.files.out_folder import refuse_others_folder
from core.log import LOG
from core.storage.store import open_store
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.crops import encode_png
from data_pipeline.sources.drawn.shapes import matches
from data_pipeline.streaming.readable import readable
from data_pipeline.streaming.stream import first_records
from data_pipeline.tokenize.encode import pictures_of, to_bytes
from generation.config import DrawSettings, EvaluateConfig, ModelPaths, PromptConfig
from generation.evaluation.accuracy import Figures, caption_accuracy, draw_for, guidance_accuracy
from generation.sampling.prompts import prompt_of
from generation.text_to_image import Studio, open_studio, picture_grid
from parallel.mesh import own_mesh

SHOWN_PROMPTS = 48
SHOWN_CANDIDATES = 16
SHOWN_PROMPTED = 6
SCALE = 2


def evaluate_models(models: ModelPaths, data: str, out: Path, config: EvaluateConfig) -> Figures:
    """Open a run's models on this machine and evaluate them.

    Raises: ConfigError with every problem of the settings; InputError if OUT is another's folder.
    """
    check(config.problems())
    refuse_others_folder(out, "evaluate")
    out.mkdir(parents=True, exist_ok=True)
    studio = open_studio(models, config.precision, own_mesh(), batch=config.batch)
    return evaluate(studio, data, out, config)


def evaluate(studio: Studio, data: str, out: Path, config: EvaluateConfig) -> Figures:
    """Write candidates, reconstructions, image prompts and (for shapes) the caption accuracy."""
    source = RawSource(open_store(data), "validation")
    records = readable(first_records(source, config.prompts))
    captions = [record.caption for record in records]
    studio.tell_cut(captions)
    draws = config.draws
    drawn = draw_for(studio, captions, draws, config.max_candidates, config.max_candidates_prompts)
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(drawn[:SHOWN_PROMPTS]):
        name = f"candidates-{i:02d}.png"
        best = row.pictures[:SHOWN_CANDIDATES]
        write_atomic(out / name, encode_png(picture_grid([best])))
        scores = row.scores[:SHOWN_CANDIDATES].tolist()
        rows.append({"caption": row.caption, "file": name, "scores": scores})
    _reconstructions(studio, records[:16], out)
    _image_prompts(studio, records[:SHOWN_PROMPTED], out, draws)
    figures: Figures = {}
    if source.manifest.facts["request"]["source"] == "shapes":
        for shown_row, each in zip(rows, drawn, strict=False):
            shown = each.pictures[:SHOWN_CANDIDATES]
            shown_row["exact"] = [matches(each.caption, picture) for picture in shown]
        figures = caption_accuracy(studio, records, drawn, draws.seed)
        figures["temperature"] = draws.temperature
        if studio.caption_dropout:
            scales, guided = config.guidance_scales, config.guidance_prompts
            figures["guidance"] = guidance_accuracy(studio, records, draws, scales, guided)
        write_atomic(out / "accuracy.json", canonical_json(figures))
        LOG.info("caption accuracy: %s", figures)
    write_atomic(out / "candidates.json", canonical_json({"rows": rows}))
    return figures


def _reconstructions(studio: Studio, records: list[RawRecord], out: Path) -> None:
    pixels = pictures_of(records, studio.images.facts.pixels)
    again = studio.decode(studio.encode(pixels))
    grid = picture_grid([to_bytes(pixels), to_bytes(again)], SCALE)
    write_atomic(out / "reconstructions.png", encode_png(grid))


def _image_prompts(
    studio: Studio, records: list[RawRecord], out: Path, settings: DrawSettings
) -> None:
    """A row a record: the picture, then candidates that keep the upper half of its tokens."""
    few, model = replace(settings, candidates=4), studio.sampler.config
    upper = PromptConfig(keep_rows=model.grid // 2)
    rows = []
    for record in records:
        pixels = pictures_of([record], studio.images.facts.pixels)
        prompt = prompt_of(studio.encode(pixels)[0], upper, model.grid, model.columns)
        drawn = studio.draw([record.caption], few, prompt)[0]
        rows.append(np.concatenate([to_bytes(pixels), drawn.pictures]))
    write_atomic(out / "image-prompts.png", encode_png(picture_grid(rows, SCALE)))
