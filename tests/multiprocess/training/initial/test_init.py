"""Weights to start from, on every engine and mesh; and settings changed on purpose."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.object_server import ObjectServer
from core.errors import EXIT_GAVE_UP
from core.files.atomic import seal
from core.storage.store import open_store
from data_pipeline.text.bpe import load_tokenizer
from models.prior import build_prior
from parallel.mesh import own_mesh
from parallel.world import ALONE
from tests.harness import rows_of, tapir
from tests.multiprocess.training.checks import largest_difference
from training.config import ClipTrain, DVAETrain
from training.export.weights import load_prior, open_model, read_model
from training.initial.carry_over import extend_rows
from training.initial.source import open_source
from training.initial.weights import DrawnWeights, InitialReader, load_initial
from training.presets import PRESETS
from training.run.config import config_of
from training.schedules import learning_rate
from training.stages import make_task, settings_from_json

SMALL = ["--model.dim=48", "--model.heads=2", "--loop.global-batch-size=8"]
SMALL += ["--loop.validation-samples=8", "--loop.log-every=1", "--engine.precision=fp32"]
SMALL += ["--engine.matmul-precision=highest", "--profile.peak-tflops=0.1"]
ONE = ["--engine.name=reference", "--mesh.data=1"]
LARGER = ["--model.layers=3", "--model.text-length=20"]
MESHES = {
    "tensor 2 x pipeline 2": [
        *("--engine.name=deepspeed_pipe", "--engine.gradient-accumulation-steps=2"),
        *("--mesh.data=1", "--mesh.tensor=2", "--mesh.pipeline=2"),
    ],
    "ZeRO-3 on 2": ["--engine.name=deepspeed_zero", "--engine.zero-stage=3", "--mesh.data=2"],
}


@pytest.fixture(scope="module")
def base(tokens: Path, bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished prior, 3 of whose 3 steps are a checkpoint, too."""
    out = tmp_path_factory.mktemp("base") / "prior"
    flags = ["--model.layers=2", "--model.text-length=16", "--loop.steps=3", f"--bpe={bpe}", *ONE]
    tapir("train", "prior", "tiny", f"--data={tokens}", f"--out={out}", *SMALL, *flags)
    return out


@pytest.fixture(scope="module")
def other(raw: Path, dvae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of other merges in `bpe`, and its `tokens`."""
    folder = tmp_path_factory.mktemp("other")
    small = ["--vocabulary=290", "--spaces=alone"]
    tapir("train", "bpe", "tiny", f"--data={raw}", f"--out={folder / 'bpe'}", *small)
    flags = [f"--bpe={folder / 'bpe'}", f"--dvae={dvae}", "--block=8"]
    tapir("tokenize", str(raw), str(folder / "tokens"), *flags)
    return folder


def of_others(other: Path, base: Path) -> list[str]:
    """Flags of a prior for the other tokenizer that starts from the first one's."""
    return [f"--data={other / 'tokens'}", f"--bpe={other / 'bpe'}", f"--init={base}"]


def opened(stage: str, settings: Any) -> tuple[InitialReader, dict[str, Any]]:
    """What a run of these settings on one process loads, and its event."""
    task = make_task(stage, settings, own_mesh())
    return load_initial(DrawnWeights(task.program), stage, task, settings, ALONE)


def settings_for(base: Path, **changes: Any) -> Any:
    """The settings of the first prior, with changes, started from its weights."""
    body = {name: value for name, value in config_of(base).items() if name != "stage"}
    settings = settings_from_json("prior", body)
    model = replace(settings.model, text_vocabulary=0, **changes.pop("model", {}))
    return replace(settings, model=model, init=str(base), **changes)


@pytest.mark.seconds
@pytest.mark.parametrize("place", ["", "/checkpoints", "/checkpoints/step-3"])
def test_the_same_model_takes_every_weight(base: Path, place: str) -> None:
    reader, event = opened("prior", replace(settings_for(base), init=f"{base}{place}"))
    _, weights = read_model(base, "prior")
    assert event["taken"] == len(weights) == len(reader.shapes())
    assert event["event"] == "init" and not event["new"] + event["resized"] + event["left"]
    for name, weight in weights.items():
        assert torch.equal(reader.tensor(name, "master"), weight)
        assert not reader.tensor(name, "exp_avg").any() and reader.tensor(name, "step") == 0
        assert torch.equal(reader.flat(name, "master", 1, 5), weight.reshape(-1)[1:5])
    assert place or event["digest"] == read_model(base, "prior")[0]["sha256"]


@pytest.mark.seconds
def test_other_merges_texts_and_layers_are_carried_over_by_the_rules(
    base: Path, other: Path, bpe: Path
) -> None:
    settings = settings_for(
        base,
        data=str(other / "tokens"),
        bpe=other / "bpe",
        init_bpe=bpe,
        model={"layers": 3, "text_length": 20},
    )
    reader, event = opened("prior", settings)
    _, old = read_model(base, "prior")
    sizes = replace(settings.model, text_vocabulary=290)
    drawn = dict(build_prior(sizes, settings.loop.seed).named_parameters())
    assert event["new"] and all(name.startswith("block002") for name in event["new"])
    for name in event["new"]:
        assert torch.equal(reader.tensor(name, "master"), drawn[name])
    for name in ("embedding.text_position.weight", "embedding.pad.weight"):
        assert torch.equal(reader.tensor(name, "master"), extend_rows(old[name], 20))
    before, now = (load_tokenizer(folder)[0] for folder in (bpe, other / "bpe"))
    ids, exact, averaged = before.get_vocab(), 0, 0
    for name in ("embedding.text.table.weight", "head.text.weight", "head.text.bias"):
        rows = reader.tensor(name, "master")
        for token, row in now.get_vocab().items():
            if token in ids:
                assert torch.equal(rows[row], old[name][ids[token]])
                exact += 1
            else:
                spelled = [ids[piece.value] for piece in before.model.tokenize(token)]
                assert len(spelled) > 1
                assert torch.allclose(rows[row], old[name][spelled].mean(0), atol=1e-7)
                averaged += 1
    assert exact > 3 * 256 and averaged > 9, "the tokenizers hardly differ"


@pytest.mark.world
def test_every_mesh_starts_as_one_process(base: Path, other: Path, tmp_path: Path) -> None:
    """Also with rows by token string, more text positions, and a layer that is drawn."""
    flags = [*of_others(other, base), *SMALL, *LARGER, "--loop.steps=3", "--optim.ema=0.5"]
    for name, mesh in {"one": ONE, **MESHES}.items():
        text = tapir("train", "prior", "tiny", f"--out={tmp_path / name}", *flags, *mesh)
        assert "rows by token string" in text
        for split in ("train", "validation"):
            one, here = (rows_of(tmp_path / each, split) for each in ("one", name))
            assert largest_difference(one, here, "loss") < 1e-5
        events = [json.loads((tmp_path / n / "history.json").read_text()) for n in ("one", name)]
        assert events[0] == events[1] and events[0]["events"][0]["event"] == "init"
        averaged = [dict(load_prior(tmp_path / n)[0].named_parameters()) for n in ("one", name)]
        for key, weight in averaged[0].items():  # EMA weights, which began at init's
            assert torch.allclose(averaged[1][key], weight, atol=1e-6)


@pytest.mark.seconds
@pytest.mark.parametrize("stage", ["dvae", "clip"])
def test_picture_stages_start_from_weights(
    stage: str, raw: Path, bpe: Path, dvae: Path, tmp_path: Path
) -> None:
    preset: Callable[[], Any] = PRESETS[stage]["tiny"]
    settings = replace(preset(), data=str(raw), init=str(dvae))
    assert isinstance(settings, DVAETrain | ClipTrain)
    if isinstance(settings, ClipTrain):
        small = replace(settings.model, dim=32, heads=2, layers=1)
        settings = replace(settings, bpe=bpe, model=small, init=str(tmp_path / "clip"))
        flags = ["--model.dim=32", "--model.heads=2", "--model.layers=1", "--loop.steps=1", *ONE]
        flags += [f"--bpe={bpe}", f"--data={raw}", "--loop.global-batch-size=8"]
        tapir("train", "clip", "tiny", *flags, f"--out={tmp_path / 'clip'}")
        settings = replace(settings, model=replace(small, text_length=30, pixels=16))
    reader, event = opened(stage, settings)
    _, old = read_model(Path(settings.init), stage)
    changed = ["clip.place.weight", "clip.word_place.weight"] if stage == "clip" else []
    assert (sorted(event["resized"]), event["new"]) == (changed, [])
    for name in set(old) - set(changed):
        assert torch.equal(reader.tensor(name, "master"), old[name])


@pytest.mark.seconds
def test_weights_in_a_bucket_are_those_of_the_folder(base: Path, s3: ObjectServer) -> None:
    _, weights = read_model(base, "prior")
    files = [path for path in base.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    with s3.credentials():
        bucket = open_store("s3://tapir-tests/init")
        for path in files:
            bucket.put(str(path.relative_to(base)), path.read_bytes())
        for place in ("", "/checkpoints/step-3"):
            settings = replace(settings_for(base), init=f"s3://tapir-tests/init{place}")
            reader, event = opened("prior", settings)
            assert event["from"] == f"s3://tapir-tests/init{place}"
            assert event["taken"] == len(weights)
            for name, weight in weights.items():
                assert torch.equal(reader.tensor(name, "master"), weight)


@pytest.mark.seconds
def test_unusable_weights_are_refused_before_the_first_step(
    base: Path, other: Path, dvae: Path, tokens: Path, tmp_path: Path
) -> None:
    command = ["train", "prior", "tiny", f"--data={tokens}", *SMALL, *ONE, "--loop.steps=1"]
    out = f"--out={tmp_path / 'run'}"

    def refused(*flags: str, code: int = 2) -> str:
        return tapir(*command, out, *flags, code=code)

    assert "holds a dvae, not a prior" in refused(f"--init={dvae}")
    assert "holds neither a finished model" in refused(f"--init={tmp_path / 'nothing'}")
    assert "names no bucket" in refused("--init=s3://")
    wide = refused(f"--init={base}", "--model.dim=64")
    assert "no matrix of this model's shapes" in wide and "another width" in wide
    told = refused(*of_others(other, base), f"--init-bpe={other / 'bpe'}")
    assert f"is not in {other / 'bpe'}; give the folder" in told and "as --init-bpe" in told
    assert "has no checkpoint to resume from" in refused("--resume-with=optim.lr=1e-4")
    copy = shutil.copytree(base, tmp_path / "copy")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert "model.safetensors is damaged" in refused(f"--init={copy}", code=EXIT_GAVE_UP)
    assert not rows_of(tmp_path / "run")


@pytest.mark.seconds
def test_a_run_resumes_with_changes_and_keeps_its_history(
    base: Path, tokens: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--model.layers=2", "--model.text-length=16", "--loop.steps=4", "--checkpoint.every=2"]
    command = ["train", "prior", "tiny", f"--data={tokens}", f"--out={run}", *SMALL, *flags, *ONE]
    started = [*command, f"--init={base}"]
    tapir(*started, "--loop.stop-at=2")
    refused = tapir(*started, "--optim.lr=1e-4", code=2)
    assert "--resume-with" in refused and "optim.lr" in refused
    assert "init" in tapir(*command, code=2), "another init is another run"
    changed = [*started, "--resume-with=optim.lr=1e-4,loop.steps=6"]
    text = tapir(*changed)
    assert "changed on purpose: loop.steps from 4 to 6" in text
    events = json.loads((run / "history.json").read_text())["events"]
    assert [(e["event"], e["step"]) for e in events] == [
        *[("init", 0)],
        *[("resume-with", 2)] * 2,
    ]
    rows = [{k: e.get(k) for k in ("setting", "before", "now")} for e in events[1:]]
    tiny: Any = PRESETS["prior"]["tiny"]()
    assert rows == [
        {"setting": "loop.steps", "before": 4, "now": 6},
        {"setting": "optim.lr", "before": tiny.optim.lr, "now": 1e-4},
    ]
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 6]
    optim = replace(tiny.optim, lr=1e-4)
    assert rows_of(run)[4]["lr"] == pytest.approx(learning_rate(optim, 4, 6, 0), rel=1e-12)
    assert config_of(run)["optim"]["lr"] == 1e-4
    facts = read_model(run, "prior")[0]["facts"]
    assert facts["history"] == events
    assert "has all 6 steps already" in tapir(*changed), "a restarted command changes no more"
    assert json.loads((run / "history.json").read_text())["events"] == events
    shutil.rmtree(run / "checkpoints")
    anew = [*command, "--loop.stop-at=1"]
    tapir(*anew)
    assert not (run / "history.json").exists(), "it was another run's"


@pytest.mark.seconds
def test_a_replay_does_not_start_from_other_weights(base: Path, tmp_path: Path) -> None:
    """A capsule before the first checkpoint names the weights that its run started from."""
    digest = read_model(base, "prior")[0]["sha256"]
    config = {**config_of(base), "init": str(base), "stage": "prior"}
    body: dict[str, Any] = {"stage": "prior", "step": 1, "position": {}, "records": []}
    body |= {"config": config, "checkpoint": None, "reason": "planted", "losses": {}}
    for then, code in ((digest, 0), ("0" * 64, 2)):
        history = [{"event": "init", "step": 0, "digest": then}]
        (tmp_path / "c.json").write_bytes(seal({**body, "grad_norm": 0.0, "history": history}))
        text = tapir("replay", str(tmp_path / "c.json"), code=code)
        assert ("started from other weights (sha256 0000" in text) == bool(code)


@pytest.mark.seconds
def test_an_extended_run_has_no_model_until_it_ends(base: Path, tokens: Path, bpe: Path) -> None:
    """Also if it ends at a checkpoint that is there already."""
    run = shutil.copytree(base, base.parent / "extended")
    flags = ["--model.layers=2", "--model.text-length=16", f"--bpe={bpe}", *SMALL, *ONE]
    command = ["train", "prior", "tiny", f"--data={tokens}", f"--out={run}", *flags]
    extended = [*command, "--loop.steps=3", "--resume-with=loop.steps=5"]
    assert "removing its finished model of step 3" in tapir(*extended, "--loop.stop-at=4")
    assert open_source(str(run), "prior").url.endswith("step-4")
    unfinished = open_model(run, "prior").facts
    assert unfinished["step"] == 4 and [row["now"] for row in unfinished["history"]] == [5]
    shorter = [*command, "--loop.steps=5", "--resume-with=loop.steps=4"]
    assert "has all 4 steps already" in tapir(*shorter)
    facts = read_model(run, "prior")[0]["facts"]
    assert facts["step"] == 4 and [row["now"] for row in facts["history"]] == [5, 4]
    written = (run / "model.json").stat().st_mtime_ns
    tapir(*shorter)
    assert (run / "model.json").stat().st_mtime_ns == written, "it is written once"
