"""`tapir demo`: run every stage as its own command, with a private object store."""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.chain import Chain, Job, Resources
from cluster.local import LocalConfig, commands
from cluster.object_server import ObjectServer, object_server
from cluster.processes import start, stop
from core.errors import EXIT_WRONG_INPUT, InputError, TapirError
from core.files.atomic import canonical_json, held, write_atomic
from core.files.out_folder import refuse_others_folder
from core.gpus import gpu_problems, usable_gpus
from core.log import LOG
from core.storage.s3 import S3Store
from generation.config import DemoConfig
from parallel.config import MeshConfig
from workflow.chain.stages import chain_of
from workflow.report import write_report
from workflow.run_file import FOLDERS, STAGES, RunFile, StageSpec
from workflow.run_flags import Value
from workflow.summary import summarise

BUCKET = "tapir-demo"
TOKEN_WORKERS = 2
SECONDS, NOTE = "seconds.json", "demo.json"
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
CAPTION_DROP = 0.1
"""Caption dropout of the prior, so that the report can show the effect of guidance."""


@dataclass(frozen=True, kw_only=True)
class DemoStage:
    """One step of the demo: commands that run side by side."""

    name: str
    commands: list[list[str]]


def run_demo(config: DemoConfig) -> Path:
    """Run all stages, write summary.json and report.html; finished stages are kept.

    Raises: TapirError naming the stage that failed, with the end of its log.
    """
    config = fitted(config, usable_gpus())
    folder = config.folder
    began = time.monotonic()
    refuse_others_folder(folder, "demo")
    with held(folder, "demo"), object_server(folder / "store", BUCKET) as server:
        _claim(folder, config)
        stages = demo_stages(config)
        for stage in stages:
            _run(stage, folder, server)
    seconds = _seconds(folder)
    LOG.info("all stages in %.0f s", time.monotonic() - began)
    typed = ["tapir " + " ".join(c) for stage in stages for c in stage.commands]
    summary = summarise(folder, config.data, config.size, typed, seconds)
    write_atomic(folder / "summary.json", canonical_json(summary))
    return write_report(folder)


def _claim(folder: Path, config: DemoConfig) -> None:
    """Store this demo's settings; raises InputError if the folder holds another demo."""
    mine = {name: getattr(config, name) for name in ("data", "mesh", "size", "seed")}
    note = folder / NOTE
    if not note.exists():
        write_atomic(note, canonical_json(mine))
    try:
        other = dict(json.loads(note.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{note} is damaged: {error}; delete it, or give another --out") from error
    for name, value in mine.items():
        if other.get(name) != value:
            raise InputError(
                f"the demo in {folder} has another --{name}: {other.get(name)}, not {value}; give "
                "that one, or another --out"
            )


def fitted(config: DemoConfig, gpus: int) -> DemoConfig:
    """Reduce the demo to one rank if this machine has fewer GPUs than its mesh has ranks.

    Without GPUs all ranks share the CPU.
    """
    flags = MESHES[config.mesh].items()
    mesh = MeshConfig(**{k[5:]: int(v) for k, v in flags if k.startswith("mesh.")})
    if not gpu_problems(mesh.world, gpus):
        return config
    LOG.info("%d ranks need as many GPUs, %d visible: one rank trains", mesh.world, gpus)
    return replace(config, mesh="1")


def demo_stages(config: DemoConfig) -> list[DemoStage]:
    """The demo as the commands of its run file, which a user could type."""
    chain = chain_of(demo_run(config), "local")
    stages = [_stage(chain, job) for job in chain.jobs if job.name in STAGES]
    if config.mesh != "1":
        last = chain_of(demo_run(config, resharded=True), "local")
        job = next(job for job in last.jobs if job.name == "prior")
        place = 1 + [stage.name for stage in stages].index("prior")
        stages.insert(place, replace(_stage(last, job), name=RESHARD))
    return stages


def _stage(chain: Chain, job: Job) -> DemoStage:
    here = len(chain.tapir())
    arguments = [command[here:] for command in commands(chain, job, LocalConfig())]
    return DemoStage(name=FOLDERS.get(job.name, job.name), commands=arguments)


def demo_run(config: DemoConfig, resharded: bool = False) -> RunFile:
    """The demo as a run file, with the prior's first part, or if `resharded` its last part."""
    sizes = _sizes(config)
    first = sizes["prior"].pop("loop.stop_at")
    alone: dict[str, Value] = {"mesh.data": 1} if config.mesh == "1" else {}
    prior: dict[str, Value] = {**sizes["prior"], "caption_dropout": CAPTION_DROP}
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


def _run(stage: DemoStage, folder: Path, server: ObjectServer) -> None:
    began = time.monotonic()
    log = folder / stage.name / "log.txt"
    LOG.info("stage %s: tapir %s", stage.name, " ".join(stage.commands[0]))
    environment = {**os.environ, **server.environment}
    running = []
    try:
        for command in stage.commands:
            running.append(start([sys.executable, "-P", "-m", "tapir", *command], log, environment))
        _wait(stage, running, log)
    finally:
        for process in running:
            stop(process)
    if stage.name in ("pack", "tokens"):
        _copy_manifests(stage.name, folder, server)
    done = {**_seconds(folder)}
    done[stage.name] = round(max(done.get(stage.name, 0.0), time.monotonic() - began), 1)
    write_atomic(folder / SECONDS, canonical_json(done))
    LOG.info("stage %s took %.0f s", stage.name, time.monotonic() - began)


def _wait(stage: DemoStage, running: list[Any], log: Path) -> None:
    """Wait for all commands, and show their logs."""
    shown = log.stat().st_size if log.exists() else 0
    waiting = True
    while waiting:
        waiting = any(process.poll() is None for process in running)
        with open(log, "rb") as file:
            file.seek(shown)
            news = file.read()
        shown += len(news)
        for line in news.decode(errors="replace").splitlines():
            LOG.info("  %s", line)
        failed = [process for process in running if process.poll() not in (None, 0)]
        if failed and failed[0].returncode == EXIT_WRONG_INPUT:
            raise InputError(
                f"stage {stage.name} refused its input (above, and in {log}); mend it, or give "
                "another --out"
            )
        if failed:
            raise TapirError(
                f"stage {stage.name} failed with exit code {failed[0].returncode}; its log is "
                f"{log}; the same command goes on from here"
            )
        time.sleep(0.5 if waiting else 0)


def _copy_manifests(name: str, folder: Path, server: ObjectServer) -> None:
    with server.credentials():
        store = S3Store(BUCKET, "raw" if name == "pack" else "tokens")
        for split in ("train", "validation"):
            data = store.get(f"{split}/manifest.json")
            write_atomic(folder / name / f"{split}-manifest.json", data)


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / SECONDS
    return dict(json.loads(path.read_text())) if path.exists() else {}
