"""`tapir demo`: run every stage as its own command, with a private object store."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.chain import Resources
from cluster.object_server import object_server
from core.config import check
from core.files.atomic import canonical_json, held, write_atomic
from core.files.out_folder import refuse_others_folder
from core.gpus import gpu_problems, usable_gpus
from core.log import LOG
from parallel.config import MeshConfig
from workflow.chain.here import (
    LocalStage,
    named,
    run_stage,
    seconds_of,
    stages_of,
    typed,
)
from workflow.demo_config import DemoConfig
from workflow.demo_folder import BUCKET, claim, copy_manifests
from workflow.own_pairs.demo import run_own_pairs
from workflow.report.page import write_report
from workflow.report.summary import summarise
from workflow.run_file import STAGES, RunFile, StageSpec
from workflow.run_flags import Value

TOKEN_WORKERS = 2
MESHES: dict[str, dict[str, Value]] = {
    "1": {"mesh.data": 1, "engine.name": "reference"},
    "tp2pp2dp2": {
        "mesh.tensor": 2,
        "mesh.pipeline": 2,
        "mesh.data": 2,
        "engine.name": "deepspeed_pipe",
        "engine.gradient_accumulation_steps": 2,
        "compress.rank": 44,
        "compress.warm_start": True,
    },
}
"""Flags of the prior's last part; 44 is the paper's 0.226 times the width of 192."""
RESHARD = "reshard"
"""The stage that resumes the prior on another mesh; its own folder holds only its log."""
EVALUATED: dict[str, Value] = {
    "prompts": 512,
    "candidates": 16,
    "max_candidates": 64,
    "guidance_prompts": 64,
    "temperature": 0.8,
    "guidance": 1.5,
}
PRIOR: dict[str, Value] = {"caption_dropout": 0.1, "model.mlp": "gated"}
"""Of every prior: caption dropout, so that the report can show the effect of guidance, and the MLP
with the lowest loss at equal time (docs/reference/presets.md)."""


def run_demo(config: DemoConfig) -> Path:
    """Run all stages, write summary.json and report.html; finished stages are kept.

    Raises: TapirError naming the stage that failed, with the end of its log.
    """
    check(config.problems())
    if config.own:
        return run_own_pairs(config)
    config = fitted(config, usable_gpus())
    folder = config.folder
    began = time.monotonic()
    refuse_others_folder(folder, "demo")
    with held(folder, "demo"), object_server(folder / "store", BUCKET) as server:
        claim(folder, {name: getattr(config, name) for name in ("data", "mesh", "size", "seed")})
        stages = demo_stages(config)
        for stage in stages:
            run_stage(stage, folder, server.environment)
            if stage.name in ("pack", "tokens"):
                copy_manifests(stage.name, folder, server)
    LOG.info("all stages in %.0f s", time.monotonic() - began)
    summary = summarise(folder, config.data, config.size, typed(stages), seconds_of(folder))
    write_atomic(folder / "summary.json", canonical_json(summary))
    return write_report(folder)


def fitted(config: DemoConfig, gpus: int) -> DemoConfig:
    """Reduce the demo to one rank if this machine has fewer GPUs than its mesh has ranks.

    Without GPUs all ranks share the CPU.
    """
    flags = MESHES[config.mesh].items()
    sizes: dict[str, Any] = {k[5:]: int(v) for k, v in flags if k.startswith("mesh.")}
    mesh = MeshConfig(**sizes)
    if not gpu_problems(mesh.world, gpus):
        return config
    LOG.info("%d ranks need as many GPUs, %d visible: one rank trains", mesh.world, gpus)
    return replace(config, mesh="1")


def demo_stages(config: DemoConfig) -> list[LocalStage]:
    """The demo as the commands of its run file, which a user could type."""
    stages = stages_of(demo_run(config))
    if config.mesh != "1":
        last = next(s for s in stages_of(demo_run(config, resharded=True)) if s.name == "prior")
        place = 1 + [stage.name for stage in stages].index("prior")
        stages.insert(place, named(last, RESHARD))
    return stages


def demo_run(config: DemoConfig, resharded: bool = False) -> RunFile:
    """The demo as a run file, with the prior's first part, or if `resharded` its last part."""
    sizes = _sizes(config)
    first = sizes["prior"].pop("loop.stop_at")
    alone: dict[str, Value] = {"mesh.data": 1} if config.mesh == "1" else {}
    prior: dict[str, Value] = {**sizes["prior"], **PRIOR}
    if resharded or config.mesh == "1":
        prior.update(MESHES[config.mesh])
    else:
        prior["loop.stop_at"] = first
    changes = {"dvae": alone, "clip": alone, "prior": prior}
    for name in ("dvae", "prior", "clip"):
        changes[name] = {**changes[name], "loop.seed": config.seed}
    for name in ("score", "evaluate"):
        changes[name] = {"seed": config.seed}
    return RunFile(
        name="demo",
        out=config.folder,
        store=f"s3://{BUCKET}",
        stages={
            name: StageSpec(
                source=config.data if name == "pack" else "",
                flags={**sizes.get(name, {}), **changes.get(name, {})},
                resources=Resources(workers=TOKEN_WORKERS if name == "tokenize" else 1),
            )
            for name in STAGES
            if name != "overlap"
        },
    )


def _sizes(config: DemoConfig) -> dict[str, dict[str, Value]]:
    """Changes of the demo to the presets; loop.stop_at ends the prior's first part."""
    shapes = config.data == "shapes"
    if config.size == "mini":
        short: dict[str, Value] = {
            "loop.steps": 6,
            "loop.global_batch_size": 32,
            "loop.validation_samples": 32,
        }
        learns = shapes  # to draw what a caption says; emoji only test the plumbing
        pack = {"count": 1500 if learns else 300, "validation": 0.2}
        prior = {**short, "loop.steps": 100 if learns else 24, "loop.stop_at": 90 if learns else 18}
        return {
            "pack": {**pack, "shard_pairs": 200, "block": 8},
            "dvae": {**short, "loop.steps": 100 if learns else 6},
            "tokenize": {"block": 8},
            "prior": {**prior, "optim.warmup": 4, "model.text_length": 12},
            "clip": short,
            "score": {"captions": 8, "candidates": 2},
            "evaluate": {
                "prompts": 8,
                "candidates": 4,
                "max_candidates": 8,
                "max_candidates_prompts": 2,
            },
        }
    if shapes:
        return {
            "pack": {"count": 16_000},
            "prior": {"loop.steps": 920, "loop.stop_at": 880, "model.text_length": 12},
            "clip": {"loop.steps": 280, "model.text_length": 12},
            "score": {"candidates": 1},
            "evaluate": EVALUATED,
        }
    return {
        "pack": {"validation": 0.1},
        "prior": {"loop.steps": 900, "loop.stop_at": 840},
        "clip": {"loop.steps": 300},
        "score": {"candidates": 4},
        "evaluate": {"prompts": 64},
    }
