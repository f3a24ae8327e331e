"""The whole pipeline in miniature, with SeaweedFS, DeepSpeed and npm."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.sources.drawn.shapes import draw_scene, render
from data_pipeline.text.bpe import encode, load_tokenizer
from data_pipeline.tokenize.encode import to_tensor
from tests.harness import cold_tapir, processes_with, rows_of, tapir
from tests.hostile import foreign_code, hostile_folder
from training.export.weights import load_dvae, load_prior
from training.tasks.task import pad_text

STAGES = ["pack", "bpe", "dvae", "tokens", "prior", "reshard", "clip", "scores", "samples"]


@torch.no_grad()
def caption_accuracy(out: Path, count: int = 256) -> float:
    """How often a new picture is likelier with its own caption than with the next one's.

    A prior that ignores captions has 0.5, whatever its loss.
    """
    dvae, _ = load_dvae(out / "dvae")
    layers, config, _ = load_prior(out / "prior")
    tokenizer, _ = load_tokenizer(out / "bpe")
    scenes = [draw_scene(1, i) for i in range(count)]
    pictures = [render(scene, dvae.config.pixels, 1, i) for i, scene in enumerate(scenes)]
    image = dvae.tokens(to_tensor(np.stack(pictures)))
    text = pad_text([encode(tokenizer, scene.caption) for scene in scenes], config.text_length)
    losses = []
    for captions in (text, text.roll(1, 0)):
        state = {"text": captions, "image": image}
        for layer in layers.values():
            state = layer(state)
        each = F.cross_entropy(state.image.transpose(1, 2), image, reduction="none")
        losses.append(each.sum(1))
    return float((losses[0] < losses[1]).float().mean())


@pytest.mark.world
def test_shapes_demo_in_miniature(tmp_path: Path) -> None:
    out, hostile = tmp_path / "demo", hostile_folder(tmp_path / "hostile")
    text = cold_tapir("demo", "--size=mini", f"--out={out}", TERM="dumb", cwd=hostile)
    summary = json.loads((out / "summary.json").read_text())
    assert set(STAGES) <= set(summary["seconds"]) and len(summary["commands"]) == 10
    assert summary["prior"]["engine"] == "deepspeed_pipe" and summary["prior"]["compress_rank"] > 0
    mesh = {"data": 2, "tensor": 2, "pipeline": 2, "nodes": 1, "sequence_parallel": False}
    assert summary["prior"]["mesh"] == mesh
    steps = rows_of(out / "prior")
    assert [row["step"] for row in steps] == [*range(10, 101, 10)]
    # a prior that ignores captions has half; one that ignores the past has the entropy
    prior = summary["prior"]
    assert caption_accuracy(out) > 0.75
    assert prior["validation_loss"] < prior["shuffled_caption_loss"] - 0.05
    assert prior["validation_loss"] < 0.75 * prior["per_position_entropy"]
    assert prior["last_loss"] < 0.75 * prior["first_loss"]
    assert summary["caption_accuracy"]["checker_on_truth"] == 1.0
    assert set(summary["caption_accuracy"]["guidance"]) == {"1", "1.5", "2", "3", "4", "5"}
    scores = json.loads((out / "scores" / "scores.json").read_text())
    assert [row["radius"] for row in scores["rows"]] == [0, 1, 2, 4, 8]
    assert "proxy" in scores["label"]
    assert {"perplexity", "psnr"} <= set(summary["dvae"])
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 4 and "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    for stage in STAGES:
        assert (out / stage).is_dir()
    secrets = [line for line in text.splitlines() if "secret" in line.lower()]
    assert not secrets and not processes_with(str(out))
    again = tapir("demo", "--size=mini", f"--out={out}")
    assert "already holds this data set" in again and "has all 100 steps already" in again
    assert "has all 6 steps already" in again
    assert "has another --seed" in tapir("demo", "--size=mini", "--seed=1", f"--out={out}", code=2)
    models = [f"--{name}={out / name}" for name in ("prior", "dvae", "clip", "bpe")]
    grid = tmp_path / "grid.png"
    flags = [f"--out={grid}", "--candidates=3", *models]
    tapir("sample", "a small red circle", *flags, cwd=hostile)
    assert foreign_code(hostile) == []
    assert grid.stat().st_size > 100
    assert "tapir train prior" in tapir("sample", "x", "--prior=/nowhere", code=2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="the emoji come by npm: apt install npm")
def test_emoji_demo_in_miniature(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    cold_tapir("demo", "--size=mini", "--data=emoji", f"--out={out}", "--mesh=1")
    summary = json.loads((out / "summary.json").read_text())
    assert "caption_accuracy" not in summary and summary["prior"]["validation_loss"] > 0
    assert (out / "report.html").exists()
