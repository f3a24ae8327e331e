"""Settings that a resumed run changes on purpose."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.config import PriorConfig
from training.config import DVAETrain, PriorTrain
from training.run.resume_with import changes_of, resume_with_problems, with_changes


def test_changes_are_parsed_and_applied() -> None:
    text = "optim.lr=1e-4,loop.steps=2000,engine.precision=bf16,bpe=runs/b,"
    text += "checkpoint.async-save=false"
    settings = replace(PriorTrain(), resume_with=text)
    assert resume_with_problems(settings) == [] and settings.problems(1) == []
    made = with_changes(settings)
    assert (made.optim.lr, made.loop.steps, made.engine.precision) == (1e-4, 2000, "bf16")
    assert made.bpe == Path("runs/b") and made.checkpoint.async_save is False
    assert made.model == PriorTrain().model and made.loop.seed == 0
    assert with_changes(made) == made, "a restarted command changes the same settings again"
    assert changes_of("") == {} and with_changes(PriorTrain()) == PriorTrain()


def test_values_may_hold_commas() -> None:
    text = "data=s3://a/b:0.7,c,d:3/10,freeze=^block00{1,2}|a,loop.log-every=2,"
    changes = {"data": "s3://a/b:0.7,c,d:3/10", "freeze": "^block00{1,2}|a", "loop.log_every": 2}
    assert changes_of(text) == changes
    made = with_changes(PriorTrain(resume_with=text))
    assert made.data == changes["data"] and made.freeze == changes["freeze"]
    assert changes_of(",optim.lr=1,,grow=true,") == {"optim.lr": 1, "grow": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "'optim.lr' is not SETTING=VALUE"),
        ("=3", "'=3' is not SETTING=VALUE"),
        ("optim.lrr=1", "there is no setting 'optim.lrr'; did you mean"),
        ("optim=1", "there is no setting 'optim'"),
        ("loop.steps=2e3", "resume_with.loop.steps=2000.0 must be a whole number"),
        ("engine.precision=fp8", "engine.precision='fp8' must be"),
        ("model.dim=64", "model.dim cannot change: the checkpoint's tensors"),
        ("loop.seed=1", "loop.seed cannot change: the data order"),
        ("order.lanes=1", "order.lanes cannot change: the data order"),
        ("loop.global_batch_size=8", "loop.global_batch_size cannot change: the position"),
        ("model.text_weight=0.5", "model.text_weight cannot change: losses before and after"),
        ("model.conv_kernel=5", "model.conv_kernel cannot change: the weights were trained to"),
        ("out=runs/x", "out cannot change: give it as --out"),
        ("resume_with=a=1", "resume_with cannot change"),
        ("lora.rank=4", "lora.rank cannot change: the checkpoint's tensors"),
        ("optim.lr=1e-4,loop.steps=3,optim.lr=1", "optim.lr is given 2 times; give it once"),
    ],
)
def test_every_wrong_change_is_named(text: str, message: str) -> None:
    settings = PriorTrain(resume_with=text, model=PriorConfig())
    (problem,) = resume_with_problems(settings)
    assert message in problem
    assert problem in settings.fixed_problems()
    both = resume_with_problems(replace(settings, resume_with=f"{text},model.heads=2"))
    assert len(both) == 2 and message in "\n".join(both)
    assert "model.heads cannot change: the weights were trained" in "\n".join(both)


def test_why_a_dvae_keeps_its_settings() -> None:
    for name, why in (
        ("model.min_log_scale=-9", "losses before and after"),
        ("model.init=paper", "it acts on the weights before step 1 alone"),
        ("model.gain=0.5", "the weights were trained to compute with it"),
        ("model.width=8", "the checkpoint's tensors have these shapes"),
    ):
        (problem,) = resume_with_problems(DVAETrain(resume_with=name))
        assert f"cannot change: {why}" in problem
