"""The first hour in miniature: a demo of own pairs, and the shipped models made again."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from core.files.atomic import sha256
from data_pipeline.images.crops import encode_png
from data_pipeline.sources.drawn.shapes import draw_scene, render
from generation import shipped
from tests.harness import ROOT, cold_tapir, tapir
from training.export.weights import open_model, saved_steps
from training.presets import dvae_tiny
from training.run.folder import read_metrics
from training.schedules import learning_rate
from workflow.chain.here import LocalStage, run_stage, seconds_of
from workflow.own_pairs.pace import Pace
from workflow.weights.score import score_of


def _folder(root: Path, count: int) -> Path:
    """Pictures with captions beside them, as a user has them; one picture has none."""
    root.mkdir()
    for i in range(count):
        scene = draw_scene(7, i)
        (root / f"{i:04d}.png").write_bytes(encode_png(render(scene, 48, 7, i)))
        (root / f"{i:04d}.txt").write_text(scene.caption)
    (root / "extra.png").write_bytes((root / "0000.png").read_bytes())
    return root


@pytest.mark.slow
def test_a_demo_of_own_pairs_in_miniature(tmp_path: Path) -> None:
    pairs, out = _folder(tmp_path / "My Pairs", 200), tmp_path / "demo"
    flags = [f"--data={pairs}", "--size=mini", f"--out={out}"]
    cold_tapir("demo", *flags, cwd=tmp_path)
    summary = json.loads((out / "summary.json").read_text())
    verdict = json.loads((out / "verdict.json").read_text())
    assert summary["verdict"] == verdict
    assert verdict["enough"] == "unknown", "16 steps teach captions to nobody"
    plan = json.loads((out / "sizes.json").read_text())
    assert plan["pairs"]["train"] + plan["pairs"]["held_out"] == 200 and plan["stopped"] == []
    assert plan["pairs"]["side"] == 48 and plan["size"]["pixels"] == 32
    assert set(plan["seconds"]) == {"dvae", "clip", "prior"} and min(plan["seconds"].values()) > 0
    html = (out / "report.html").read_text()
    assert "Were the pairs enough?" in html and verdict["findings"][0][:20] in html
    again = tapir("demo", *flags, cwd=tmp_path)
    assert "has all 16 steps already" in again and "measuring" not in again
    assert "has another --minutes" in tapir("demo", *flags, "--minutes=9", code=2, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "captions", "reason"),
    [
        (50, True, "has 50 usable pairs, and a demo needs about 120 at least"),
        (1, True, "no pair fell into the"),
        (2, False, "0000.png has no caption; write it to 0000.txt beside it"),
    ],
)
def test_too_few_pairs_are_told_before_anything_is_trained(
    count: int, captions: bool, reason: str, tmp_path: Path
) -> None:
    pairs, out = _folder(tmp_path / "few", count), tmp_path / "demo"
    for path in pairs.glob("*.txt") if not captions else ():
        path.unlink()
    assert reason in tapir("demo", f"--data={pairs}", f"--out={out}", code=2)
    assert not (out / "dvae").exists() and not (out / "sizes.json").exists()


@pytest.mark.slow
def test_a_stage_out_of_time_leaves_a_checkpoint_that_is_used(raw: Path, tmp_path: Path) -> None:
    command = ["train", "dvae", "tiny", f"--data={raw}", f"--out={tmp_path / 'dvae'}"]
    command += ["--loop.steps=100000", "--mesh.data=1", "--loop.validate-every=0"]
    stage = LocalStage(name="dvae", commands=[command])
    run = tmp_path / "dvae"
    assert not run_stage(stage, tmp_path, {}, is_late=lambda: bool(read_metrics(run)))
    (step,) = saved_steps(run, "dvae")
    assert 0 < step < 100_000 and open_model(run, "dvae").facts["step"] == step
    assert seconds_of(tmp_path)["dvae"] > 0


@pytest.mark.slow
def test_a_late_stage_goes_on_with_fewer_steps_to_the_end_of_its_schedule(
    raw: Path, tmp_path: Path
) -> None:
    run, steps = tmp_path / "dvae", 10**7

    def stage(steps: int, *more: str) -> LocalStage:
        command = ["train", "dvae", "tiny", f"--data={raw}", f"--out={run}", "--mesh.data=1"]
        command += ["--loop.validate-every=0", "--loop.validation-samples=16", "--optim.warmup=5"]
        return LocalStage(name="dvae", commands=[[*command, f"--loop.steps={steps}", *more]])

    pace = Pace(run, steps, 3600.0, 1.0, time.monotonic)
    assert not run_stage(stage(steps), tmp_path, {}, is_late=pace.is_late)
    assert pace.each is not None and pace.start_up is not None and pace.step >= 30
    last = saved_steps(run, "dvae")[-1] + 5
    change = f"--resume-with=loop.steps={last},optim.warmup=5"
    assert run_stage(stage(last, change), tmp_path, {})
    assert open_model(run, "dvae").facts["step"] == last and (run / "model.json").is_file()
    optim = replace(dvae_tiny().optim, warmup=5)
    row = [row for row in read_metrics(run) if row.get("split") != "validation"][-1]
    assert row["step"] == last and row["lr"] == learning_rate(optim, last - 1, last)


@pytest.mark.slow
def test_shipped_weights_are_made_again_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "workflow.weights", "shapes", "--miniature"]
    command += ["--seeds", "1", f"--work={tmp_path / 'work'}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(shipped, "WEIGHTS", out)
    card = shipped.read_card("shapes")
    assert [row["seed"] for row in card.seeds] == [1] and card.seed == 1
    assert card.seeds[0]["score"] == card.score.value and card.seeds[0]["image_loss"] > 0
    models = shipped.shipped_models("shapes")
    assert score_of(models, card.score) == card.score.value
    run = tmp_path / "work" / "shapes" / "seed-1"
    assert open_model(models.prior, "prior").facts["trained"] == sha256(
        (run / "prior" / "model.safetensors").read_bytes()
    )
    text = (out / "shapes" / "README.md").read_text()
    assert "(shipped)" in text and "make weights SETS=shapes" in text
