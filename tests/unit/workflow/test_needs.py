"""Requirements of later steps and stages are checked before the first step."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save

from checkpoint.config import CheckpointConfig
from cli.cluster import submit
from cli.plan import plan
from cli.train import train
from core.config import from_json, to_json
from core.errors import EXIT_WRONG_INPUT, ConfigError, InputError, TapirError
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import OrderConfig, PackConfig, TokenizeConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.jobs.ledger import DONE
from data_pipeline.packing.pack import pack
from data_pipeline.text.bpe import train_bpe
from data_pipeline.tokenize.encode import Encoders
from data_pipeline.tokenize.worker import Worker
from generation.ranking import open_ranker
from generation.text_to_image import open_studio
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.tokenizers.protocol import DVAETokenizer
from parallel.config import CompressConfig, EngineConfig, MeshConfig, OptimConfig
from parallel.device import CPU
from parallel.precision import set_numerics
from parallel.tensor.ops import TensorParallel
from parallel.world import World
from planning.rehearsal.rehearse import scaled
from planning.rehearse_presets import laid_out
from tests.harness import tapir
from tests.unit.finished import write_models
from training.config import (
    BPETrain,
    ClipTrain,
    DVAETrain,
    LoopConfig,
    PriorTrain,
    StageConfig,
)
from training.presets import PRESETS
from training.tasks.clip import ClipTask
from training.tasks.dvae import DVAETask
from training.tasks.prior import PriorTask
from workflow.chain.inputs import missing_inputs
from workflow.chain.stages import chain_of, settings_of_stages
from workflow.run_file import read_runfile

PLANTED = "loop.validation_samples=512 is less than order.lanes=1024"
FLAG = "--loop.validation-samples=512"
WIDE = {"order": OrderConfig(lanes=128), "loop": LoopConfig(global_batch_size=128)}
"""More lanes than the 600 packed pairs hold out."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PriorTrain(loop=LoopConfig(validation_samples=4)), "validation_samples=4 is less than"),
        (DVAETrain(engine=EngineConfig(precision="fp16")), "precision=fp16 needs a gradient scale"),
        (ClipTrain(engine=EngineConfig(precision="fp16")), "use --engine.precision bf16"),
        (DVAETrain(compress=CompressConfig(rank=4), mesh=MeshConfig(data=2)), "only the prior's"),
        (ClipTrain(compress=CompressConfig(rank="auto"), mesh=MeshConfig(data=2)), "only the prio"),
        (
            PriorTrain(loop=LoopConfig(validate_every=0), optim=OptimConfig(halvings=1)),
            "halvings needs validations",
        ),
        (
            PriorTrain(loop=LoopConfig(validate_every=0), checkpoint=CheckpointConfig(best=True)),
            "checkpoint.best: only the last of loop.steps=1000",
        ),
        (
            PriorTrain(
                loop=LoopConfig(validate_every=7),
                checkpoint=CheckpointConfig(every=500, best=True),
            ),
            "make one a multiple",
        ),
        (DVAETrain(tau_fraction=0.0), "tau_fraction and beta_fraction must be above 0"),
        (DVAETrain(beta=-1.0), "beta must not be negative"),
        (PriorTrain(data="gs://bucket/x"), "data='gs://bucket/x' is not a store"),
        (ClipTrain(data="a:0.7,b:0.4"), "data: the shares' sum is 1.1 and must be 1; write a:7/11"),
        (PriorTrain(checkpoint=CheckpointConfig(to="s3:///x")), "checkpoint.to='s3:///x' names no"),
        (BPETrain(data="http://x"), "data='http://x' is not a store"),
        (PriorTrain(out=Path("s3://bucket/x")), "out='s3:/bucket/x' must be a folder"),
    ],
)
def test_what_would_end_a_run_later_is_a_problem(settings: StageConfig, message: str) -> None:
    assert [text for text in settings.problems() if message in text]


def test_fp16_compression_and_a_best_checkpoint_stay_where_they_work() -> None:
    prior = PriorTrain(
        engine=EngineConfig(precision="fp16"),
        compress=CompressConfig(rank=4),
        mesh=MeshConfig(data=2),
        checkpoint=CheckpointConfig(best=True),
    )
    assert not prior.problems()
    short = CheckpointConfig(best=True)
    assert not PriorTrain(loop=LoopConfig(steps=9), checkpoint=short).problems()


def test_every_preset_can_be_validated_at_any_size() -> None:
    for stage in ("dvae", "prior", "clip"):
        for name, preset in PRESETS[stage].items():
            settings = preset()
            assert not settings.problems(), (stage, name)
            loop, lanes = settings.loop, settings.order.lanes
            assert loop.validation_samples % lanes == 0, (stage, name)
            grown = scaled(settings, 1024 * settings.mesh.tensor * settings.mesh.pipeline)
            assert grown.loop.validation_samples >= grown.order.lanes, (stage, name)


def test_more_replicas_mend_no_planted_fault() -> None:
    paper = PRESETS["dvae"]["paper_dvae"]()
    assert scaled(paper, 1024).loop.validation_samples == 8192
    wrong = replace(paper, loop=replace(paper.loop, validation_samples=256))
    assert scaled(wrong, 1024).loop.validation_samples == 256


def _planted(settings: PriorTrain) -> PriorTrain:
    return replace(settings, loop=replace(settings.loop, validation_samples=512))


@pytest.mark.parametrize("preset", ["paper_2_8b", "paper_5_6b", "paper_12b"])
def test_plan_train_and_rehearse_name_it_before_step_1(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.train.train_stage", _refuse_a_start)
    with pytest.raises(ConfigError, match=PLANTED) as caught:
        train(["prior", preset, FLAG])
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    _, refused = laid_out([("prior", preset), ("dvae", "paper_dvae")], [FLAG], 1024)
    assert list(refused) == [f"prior {preset}"] and PLANTED in refused[f"prior {preset}"]
    planted = _planted(PRESETS["prior"][preset]())
    monkeypatch.setitem(PRESETS["prior"], preset, lambda: planted)
    monkeypatch.setattr("planning.plan.search", None)  # nothing is looked for
    with pytest.raises(ConfigError, match=PLANTED):
        plan([preset])


def _refuse_a_start(stage: str, settings: StageConfig) -> None:
    """Replaces `train_stage`: a test fails if the verb gets past its first line."""
    from core.config import check

    check(settings.problems())
    raise AssertionError("ranks would have been started")


def run_file(folder: Path, **stages: Any) -> Path:
    """A run file with some stages and data in the folder."""
    body = {"name": "run", "out": str(folder / "out"), "store": str(folder), "stages": stages}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(body).replace("OUT", str(folder / "out")))
    return path


PAPER = {"preset": "paper_12b", "flags": {"loop.validation_samples": 512}}
SHAPES = {"source": "shapes", "flags": {"count": 600}}
HALF = {"source": "shapes", "flags": {"count": 900, "validation": 0.4}}
PAIRS: dict[str, Any] = {"pack": {"source": "shapes"}}
SMALL: dict[str, Any] = {"preset": "small", "flags": {"model.pixels": 32}}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"prior": PAPER}, f"stages.prior: {PLANTED}"),
        ({"pack": SHAPES, "dvae": SMALL}, "has about 30 pairs, .* one for each of order.lanes=64"),
        (
            {"pack": HALF, "dvae": SMALL},
            "about 540 pairs in 9 blocks, .* order.lanes=64 .*--order.lanes 8, .*--block 4",
        ),
        (
            {"pack": SHAPES, "dvae": {}, "tokenize": {}, "prior": {"preset": "small"}},
            "stages.prior: the validation split of pack's 600 pairs",
        ),
        (
            {"pack": {"source": "/data"}, "dvae": {}, "tokenize": {}},
            "min_side=0 lets smaller pictures in, .* dVAE's 32 .* min_side to 32",
        ),
        (
            {"pack": {"source": "emoji"}, "dvae": {"preset": "paper_dvae"}, "tokenize": {}},
            "emoji has 64 pixels a side",
        ),
        (
            {"pack": SHAPES, "dvae": {"flags": {"model.pixels": 64}}, "tokenize": {}},
            "set its flag pixels to 64",
        ),
        (
            {
                "pack": {"source": "panels"},
                "dvae": {"flags": {"model.pixels": 128}},
                "tokenize": {},
            },
            "panels has 64 pixels a side, .* set its flag pixels to 64",
        ),
        ({"dvae": {"flags": {"model.pixels": 64}}, "clip": {}}, "model.pixels=32 cannot rank"),
        (
            {"dvae": {}, "tokenize": {}, "prior": {"flags": {"model.grid": 16}}},
            "model.grid=16 is not that of the dVAE, 8",
        ),
        ({"dvae": {"gpus": 1}}, "2 ranks a node have only 1 GPUs, .* give nodes: 2"),
        ({"bpe": {"flags": {"vocabulary": 70_000}}}, "stages.bpe: vocabulary=70000"),
    ],
)
def test_a_chain_is_refused_for_what_a_later_stage_needs(
    tmp_path: Path, stages: dict[str, Any], message: str
) -> None:
    with pytest.raises(TapirError, match=message) as caught:
        submit([str(run_file(tmp_path, **stages)), "--dry-run"])
    assert caught.value.exit_code == EXIT_WRONG_INPUT and not (tmp_path / "out").exists()


def test_filters_of_pack_are_flags_of_a_run_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"min_side": 32, "english": True, "aspect": 2}
    file = run_file(tmp_path, pack={"source": "/data", "flags": flags}, dvae={}, tokenize={})
    submit([str(file), "--dry-run"])
    printed = capsys.readouterr().out
    assert "--aspect=2 --english --min-side=32" in printed


@pytest.fixture
def packed(raw: Path, tokens: Path, tmp_path: Path) -> Path:
    """A store with 600 pairs and their tokens."""
    (tmp_path / "raw").symlink_to(raw)
    (tmp_path / "tokens").symlink_to(tokens)
    return tmp_path


def test_submit_names_a_packed_split_that_is_too_small(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"order.lanes": 128, "loop.global_batch_size": 128}
    stages = {name: {"flags": {**wide, "mesh.data": 1}} for name in ("dvae", "clip")}
    prior = {"flags": {**wide, "model.grid": 9}}
    with pytest.raises(ConfigError) as caught:
        submit([str(run_file(packed, **stages, prior=prior)), "--dry-run"])
    message, held_out = str(caught.value), _held_out(packed / "raw")
    for stage in ("dvae", "clip", "prior"):
        assert f"stages.{stage}: the validation split of {packed}/" in message
    assert message.count(f"has {held_out} pairs") == 3 and "model.grid=9 is not that of" in message
    (packed / "tokens").unlink()
    with pytest.raises(ConfigError, match=r"stages.prior: the validation split of .*/raw has"):
        submit([str(run_file(packed, tokenize={}, prior={"flags": wide})), "--dry-run"])
    capsys.readouterr()
    submit([str(run_file(packed, prior={"flags": wide})), "--dry-run"])
    assert "train prior" in capsys.readouterr().out


def test_submit_reads_each_set_of_a_mixture(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mixture of the run's own pairs with those of another folder."""
    small = {"order.lanes": 2, "loop.global_batch_size": 512}
    data = {"data": f"{packed}/raw:0.75,{packed}/more:0.25", "mesh.data": 1}
    file = run_file(packed, dvae={"flags": {**small, **data}})
    with pytest.raises(ConfigError, match=r"dvae needs pairs from .*/more: there is nothing"):
        submit([str(file)])
    few = PackConfig(count=24, validation=0.2, shard_pairs=4, block=4)
    pack("shapes", FolderStore(packed / "more"), few)
    submit([str(file), "--dry-run"])  # 512 pairs a batch: the sets need not fill one alone
    assert f"{packed}/more:0.25" in capsys.readouterr().out
    wide = {"order.lanes": 16, "loop.global_batch_size": 16}
    with pytest.raises(ConfigError, match=r"stages.dvae: the validation split of .*/more has"):
        submit([str(run_file(packed, dvae={"flags": {**wide, **data}})), "--dry-run"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"prior": {}}, r"prior needs tokens from .*/tokens: .* add tokenize"),
        (
            {"prior": {"flags": {"bpe_dropout": 0.1}}},
            r"a BPE vocabulary from .*/out/bpe: .* add bpe",
        ),
        ({"dvae": {}, "clip": {}}, r"dvae and clip need pairs from .*/raw: .* add pack"),
        ({"evaluate": {}}, r"evaluate needs a dVAE from .*/out/dvae: .* add dvae"),
        ({"score": {"source": "coco:/x"}}, r"score needs a prior from .*/out/prior"),
        (
            {"pack": {"source": "shapes"}, "dvae": {"flags": {"init": "nowhere"}}},
            "stages.dvae.flags.init='nowhere' holds no weights",
        ),
        ({**PAIRS, "dvae": {"flags": {"init": "OUT/dvae"}}}, "dvae' holds no weights"),
        (
            {**PAIRS, "dvae": {"flags": {"init_bpe": "nowhere"}}},
            "stages.dvae.flags.init_bpe='nowhere' holds no tokenizer.json",
        ),
        *(
            ({**PAIRS, "dvae": {"flags": flags}}, rf"stages.dvae.flags.{name}='no.pth': there is")
            for name, flags in {
                "perceptual.vgg": {"perceptual.weight": 1, "perceptual.vgg": "no.pth"},
                "perceptual.linear": {
                    "perceptual.weight": 1,
                    "perceptual.vgg": __file__,
                    "perceptual.linear": "no.pth",
                },
                "rfid": {"rfid": "no.pth"},
            }.items()
        ),
        (
            {"score": {"source": "coco:/x", "flags": {"inception": "no.pth"}}},
            "stages.score.flags.inception='no.pth': there is no such file of weights",
        ),
    ],
)
def test_inputs_that_nobody_makes_are_refused_before_anything_is_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stages: dict[str, Any], message: str
) -> None:
    file = run_file(tmp_path, **stages)
    with pytest.raises(ConfigError, match=message):
        submit([str(file)])
    assert not (tmp_path / "out").exists()
    submit([str(file), "--dry-run"])
    assert re.search(message + ".* without --dry-run this is refused", caplog.text)
    run = read_runfile(file)
    assert not missing_inputs(run, settings_of_stages(run), "kubernetes")  # not its volumes


@pytest.mark.seconds
def test_submit_ignores_a_store_that_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    file = run_file(tmp_path, dvae={}, prior={})
    body = {**yaml.safe_load(file.read_text()), "store": "s3://bucket/run"}
    file.write_text(yaml.safe_dump(body))
    submit([str(file), "--dry-run"])
    assert "train dvae tiny" in capsys.readouterr().out


def _held_out(raw: Path) -> int:
    count = json.loads((raw / "validation" / "manifest.json").read_text())["samples"]
    assert 64 < count < 128
    return int(count)


def test_a_run_on_too_small_a_split_ends_before_its_model_is_built(
    raw: Path, bpe: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dvae.DVAE", "clip.Clip", "prior.prior_program"):
        monkeypatch.setattr(f"training.tasks.{name}", None)
    message = f"has {_held_out(raw)} pairs, and a validation needs one for each of order.lanes=128"
    with pytest.raises(ConfigError, match=message):
        DVAETask(DVAETrain(data=str(raw), **WIDE))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        ClipTask(ClipTrain(data=str(raw), bpe=bpe, **WIDE), World())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        PriorTask(PriorTrain(data=str(tokens), **WIDE), TensorParallel())  # type: ignore[arg-type]
    other = PriorTrain(data=str(tokens), model=PriorConfig(grid=9))
    with pytest.raises(ConfigError, match=r"model\.grid=9 is not that of"):
        PriorTask(other, TensorParallel())
    other_clip = ClipTrain(data=str(raw), bpe=bpe, model=ClipConfig(text_vocabulary=9))
    with pytest.raises(ConfigError, match=r"text_vocabulary=9 is not that of the tokenizer"):
        ClipTask(other_clip, World())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "there are no Inception weights at"),
        (b"no safetensors", "is not a safetensors file"),
        (save({"features.0.weight": torch.zeros(3)}), "holds other weights than this Inception's"),
    ],
    ids=["none", "pickle", "other"],
)
def test_weights_for_validations_are_looked_at_first(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "inception.safetensors"
    if data:
        path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        DVAETask(DVAETrain(rfid=path))


@pytest.mark.world
def test_ranks_that_would_fail_at_validation_do_not_start(tokens: Path, tmp_path: Path) -> None:
    wide = ["--order.lanes=128", "--loop.global-batch-size=128", f"--out={tmp_path / 'run'}"]
    text = tapir("train", "prior", "tiny", f"--data={tokens}", *wide, code=2)
    assert "the validation split of" in text and "order.lanes=128" in text
    assert not (tmp_path / "run").exists()


def _worker(folder: Path, dvae: DVAEConfig, entries: int = 300) -> Worker:
    raw = FolderStore(folder / "raw")
    pack("shapes", raw, PackConfig(count=60, validation=0.3, shard_pairs=10, pixels=16))
    tokenizer = train_bpe(["a red circle"], 300)
    if entries > 300:
        tokenizer.add_tokens([f"<{i}>" for i in range(entries)])
    encoders = Encoders(
        images=DVAETokenizer(DVAE(dvae), "d"),
        tokenizer=tokenizer,
        tokenizer_hash="t",
        numerics=set_numerics(CPU),
    )
    tokens, member = FolderStore(folder / "tokens"), JobWorker(number=0, count=1)
    return Worker(raw, tokens, encoders, TokenizeConfig(), member)


def test_a_token_job_stops_as_soon_as_too_much_is_left_out(tmp_path: Path) -> None:
    small = DVAEConfig(pixels=32, width=4, codebook=16, code_width=8)
    with pytest.raises(InputError, match=r"\d+ of \d+ pairs .*/train are unusable.*16x16 pixels"):
        _worker(tmp_path, small).run()
    store = FolderStore(tmp_path / "tokens")
    assert len([name for split in SPLITS for name in store.names(f"{split}/{DONE}")]) == 1


def test_what_does_not_fit_into_16_bits_is_refused_before_the_work(tmp_path: Path) -> None:
    tiny = DVAEConfig(pixels=16, width=4, codebook=16, code_width=8)
    with pytest.raises(ConfigError, match=r"the tokenizer has .* and records hold 65536"):
        _worker(tmp_path, tiny, 65_600)


def test_a_clip_of_other_pictures_is_refused_before_a_draw(tmp_path: Path) -> None:
    models = write_models(tmp_path, ["a red circle", "a blue square"])
    assert open_studio(models).ranker is not None
    with pytest.raises(InputError, match=r"trained on pictures of 16 pixels, the dVAE's have 64"):
        open_ranker(models.clip, models.bpe, pixels=64)


def test_settings_of_a_lane_a_sample_survive_json() -> None:
    settings = PRESETS["prior"]["paper_12b"]()
    assert from_json(PriorTrain, to_json(settings)) == settings
    assert settings.loop.validation_samples == settings.order.lanes == 1024


def test_sizes_of_a_tokenizer_that_is_there_already_are_compared(tmp_path: Path, raw: Path) -> None:
    models = write_models(tmp_path / "out", ["a small red circle"])
    file = run_file(
        tmp_path,
        tokenize={},
        prior={"flags": {"model.grid": 9, "init": str(models.dvae)}},
        clip={"flags": {"model.pixels": 40}},
    )
    with pytest.raises(ConfigError) as caught:
        chain_of(read_runfile(file), "local")
    dvae = tmp_path / "out" / "dvae"
    assert models.dvae == dvae
    assert f"stages.prior: model.grid=9 is not that of {dvae}" in str(caught.value)
    assert f"model.pixels=40 cannot rank {dvae}'s pictures of 16" in str(caught.value)
    run = read_runfile(file)
    assert chain_of(run, "kubernetes").jobs, "its volumes may hold another dVAE"
    assert "holds a dvae, not a prior" in str(missing_inputs(run, settings_of_stages(run), "local"))


def test_problems_of_flags_values_and_settings_are_in_one_message(tmp_path: Path) -> None:
    file = run_file(
        tmp_path,
        prior={"flags": {"mlpp": "x", "lora.rank": "four", "model.tied": 3}},
        dvae={"flags": {"loop.steps": -1, "resume_with": "loop.stepz=3"}},
    )
    with pytest.raises(ConfigError) as caught:
        settings_of_stages(read_runfile(file))
    for text in (
        "stages.prior.flags.mlpp: unknown",
        "stages.prior.flags.model.tied=3 must be true or false",
        "stages.prior.flags.lora.rank='four' must be a whole number",
        "stages.dvae: resume_with: there is no setting 'loop.stepz'",
        "stages.dvae: loop.steps",
    ):
        assert text in str(caught.value)


def test_a_problem_of_resume_with_hides_no_other(tmp_path: Path) -> None:
    wrong = ["--resume-with=loop.stepz=3", "--loop.validation-samples=4"]
    with pytest.raises(ConfigError) as trained:
        train(["prior", "tiny", f"--out={tmp_path / 'out'}", *wrong])
    _, refused = laid_out([("prior", "tiny")], wrong, 2)
    for message in (str(trained.value), refused["prior tiny"]):
        assert "validation_samples=4 is less than" in message
        assert "there is no setting 'loop.stepz'" in message
