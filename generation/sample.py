"""`tapir sample`: on this process, or with the prior sharded over the ranks of a mesh.

All ranks of a mesh decode tokens together; rank 0 alone decodes pixels, ranks and writes.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

from cluster.launcher import launch
from core.config import check, from_json, to_json
from core.errors import ConfigError, CorruptError, TapirError
from core.files.atomic import Json, refuse_folder, write_atomic
from core.flags import print_json
from core.launch_environment import ranks_given
from core.log import LOG, progress
from core.stop import heed_stop_signals
from data_pipeline.images.crops import encode_png
from data_pipeline.text.captions import clean_caption
from generation.choose_models import with_models
from generation.config import SampleRun
from generation.follow import BOARD, show, shown_steps, steps_to_draw
from generation.sampling.load_prior import cut_problems
from generation.sampling.prompts import prompt_of
from generation.text_to_image import (
    Arrivals,
    Candidates,
    open_studio,
    picture_grid,
    picture_name,
)
from models.config import PriorConfig
from parallel.engines.registry import MEGATRON
from parallel.mesh import Mesh, build_mesh, own_mesh
from parallel.world import join_world, leave_world
from training.export.weights import open_model, saved_steps

SAMPLES = Path("runs/samples")
"""Folder of pictures without an --out."""
_LONGEST_NAME = 60
PRELOAD = ["torch", "torch.distributed", "generation.sample", MEGATRON]


def sample(run: SampleRun) -> None:
    """Draw, rank and write: on this process, on ranks spawned here, or on a launcher's ranks.

    Raises: ConfigError with every problem of the settings; RankError if a rank dies.
    """
    check(run.problems())
    run = with_models(run, _texts(run))
    refuse_folder(_target(run))
    if run.pictures is not None:
        refuse_folder(run.pictures / picture_name(0, 0))
    started = ranks_given()
    if run.follow:
        check(["--follow starts its ranks itself; do not start them"] if started else [])
        _follow(run)
        return
    if started not in (None, run.mesh.world):
        raise ConfigError(
            f"{started} ranks were started, --tensor {run.tensor} x --pipeline {run.pipeline} are "
            f"{run.mesh.world}"
        )
    if started is None or run.mesh.world == 1:
        _draw(run)
    else:
        rank_main(json.dumps(to_json(run)))


def _follow(run: SampleRun) -> None:
    """Draw from each checkpoint; damaged and deleted ones are skipped.

    Raises: the last checkpoint's error if none could be drawn from.
    """
    prior, drawn, failed = run.models.paths.prior, 0, None
    shown: set[int] | None = None
    for step in steps_to_draw(prior):
        shown = shown_steps(prior, _texts(run)) if shown is None else shown
        if step in shown:
            LOG.info(
                "step %d: its samples are in %s; to draw others, delete it", step, prior / BOARD
            )
            continue
        (prior / BOARD).mkdir(parents=True, exist_ok=True)  # fails now, not after drawing
        try:
            _draw(replace(run, models=replace(run.models, step=step)))
            drawn += 1
        except TapirError as error:
            there = step in saved_steps(prior, "prior")
            if there and not isinstance(error, CorruptError):
                raise
            LOG.warning("%s; going on with the next checkpoint", error)
            failed = error
    if failed and not drawn:
        raise failed


def _draw(run: SampleRun) -> None:
    """Draw on this process, or on ranks spawned for it."""
    if run.mesh.world == 1:
        _sample(run, own_mesh())
    else:
        models = run.models.paths
        sizes = from_json(PriorConfig, open_model(models.prior, "prior", models.step).config)
        check(cut_problems(sizes, run.tensor, run.pipeline))
        launch("generation.sample:rank_main", json.dumps(to_json(run)), run.mesh.world, PRELOAD)


def rank_main(payload: str) -> None:
    """Entry point of one spawned rank."""
    run = from_json(SampleRun, json.loads(payload))
    heed_stop_signals()
    world = join_world()
    try:
        _sample(run, build_mesh(run.mesh, world))
    finally:
        leave_world(world)


def _sample(run: SampleRun, mesh: Mesh) -> None:
    """Open the models once, draw on all ranks of the mesh, and write on the first one."""
    captions, draws = _texts(run), run.draw.draws
    studio = open_studio(
        run.models.paths,
        run.draw.precision,
        mesh,
        one_row=run.draw.rows(len(captions)) == 1,
        together=run.together(len(captions), mesh.world.device.type),
        rerank=run.rerank,
        batch=run.draw.batch,
    )
    if mesh.world.rank == 0:
        studio.tell_cut(captions)
    prompt = None
    if run.keep.image is not None:
        codes = studio.codes_of_file(run.keep.image)
        model = studio.sampler.config
        prompt = prompt_of(codes, run.keep, model.grid, model.columns)
    if mesh.world.rank > 0:
        for _ in studio.codes(captions, draws, prompt):
            pass
        return
    with progress("sample", len(captions) * draws.candidates) as meter:
        drawn = studio.draw(captions, draws, prompt, Arrivals(meter, run.pictures))
    _write(run, drawn)


def _write(run: SampleRun, drawn: list[Candidates]) -> None:
    """Write the grid of the best candidates, and print their scores if they were ranked."""
    grid = picture_grid([row.pictures[: run.show] for row in drawn], 4)
    write_atomic(_target(run), encode_png(grid))
    LOG.info("wrote %s", _target(run))
    scores: Json = {row.caption: row.scores[: run.show].tolist() for row in drawn}
    if run.follow and run.models.step is not None:
        show(run.models.paths.prior, run.models.step, drawn, run.show)
        ranked = {"scores": scores} if run.rerank else {}
        print_json({"step": run.models.step, **ranked})
    elif run.rerank:
        print_json(scores)


def _target(run: SampleRun) -> Path:
    """The PNG to write; without --out it is named by the first caption."""
    if run.out is not None:
        return run.out
    first, *others = _texts(run)
    name = re.sub(r"[^\w-]+", "-", first).strip("-")[:_LONGEST_NAME] or "picture"
    return SAMPLES / (name + (f"-and-{len(others)}-more" if others else "") + ".png")


def _texts(run: SampleRun) -> list[str]:
    """The cleaned captions, without duplicates."""
    cleaned = (clean_caption(os.fsencode(caption), repr(caption)) for caption in run.captions)
    return list(dict.fromkeys(cleaned))
