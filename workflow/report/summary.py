"""The figures of all stages of a run in one place."""

import json
import os
from pathlib import Path
from typing import Any

from cluster.chain import MARKERS, read_submitted
from core.errors import InputError
from core.files.atomic import canonical_json, unseal, write_atomic
from training.run.folder import read_metrics


def summarise(
    folder: Path, data: str, size: str, commands: list[str], seconds: dict[str, float]
) -> dict[str, Any]:
    """Collect the figures of all stages from their run folders.

    Raises: InputError if one of them holds no finished run.
    """
    summary: dict[str, Any] = {"data": data, "size": size, "seconds": seconds, "commands": commands}
    summary["cores"] = os.cpu_count() or 1
    for stage in ("prior", "dvae", "clip"):
        if not any(row.get("split") == "validation" for row in read_metrics(folder / stage)):
            raise InputError(f"{folder / stage} holds no finished run; a report needs it")
    prior = json.loads((folder / "prior" / "config.json").read_text())
    rows = read_metrics(folder / "prior")
    steps = [row for row in rows if row.get("split") != "validation"]
    held_out = [row for row in rows if row.get("split") == "validation"][-1]
    rates = sorted(row["tokens_per_second"] for row in steps)
    summary["prior"] = {
        "engine": prior["engine"]["name"],
        "mesh": prior["mesh"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "validation_loss": held_out["image_loss"],
        "per_position_entropy": held_out["per_position_entropy"],
        "shuffled_caption_loss": held_out["shuffled_caption_loss"],
        "tokens_per_second": rates[len(rates) // 2],
        "compress_rank": prior["compress"]["rank"],
    }
    images = [r for r in read_metrics(folder / "dvae") if r.get("split") == "validation"][-1]
    summary["dvae"] = {key: images[key] for key in ("perplexity", "psnr", "codes_used")}
    ranked = [r for r in read_metrics(folder / "clip") if r.get("split") == "validation"][-1]
    summary["clip"] = {"accuracy": ranked["accuracy"]}
    accuracy = folder / "samples" / "accuracy.json"
    if accuracy.exists():
        summary["caption_accuracy"] = json.loads(accuracy.read_text())
    return summary


def summarise_chain(out: Path) -> None:
    """Write summary.json of a finished chain."""
    chain = read_submitted(out).chain
    seconds = {}
    for job in chain.jobs:
        paths = [out / MARKERS / name for name in job.markers()]
        spans = [unseal(p.read_bytes(), str(p))["seconds"] for p in paths if p.exists()]
        if spans:
            seconds[job.name] = round(max(spans), 1)
    pack = next((job for job in chain.jobs if job.name == "pack"), None)
    data = pack.command[1] if pack else "unknown"
    commands = [job.text for job in chain.jobs]
    summary = summarise(out, data, chain.name, commands, seconds)
    names = ("nodes", "gpus", "cpus", "workers")
    summary["resources"] = {
        job.name: {name: getattr(job.resources, name) for name in names} for job in chain.jobs
    }
    write_atomic(out / "summary.json", canonical_json(summary))
