"""What a resumed run may change, and what its checkpoint must hold, by real checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.format import StateSlice
from checkpoint.reader import CheckpointReader
from checkpoint.writer import write_checkpoint
from core.config import to_json
from core.errors import ConfigError
from core.storage.store import FolderStore
from models.config import DVAEConfig, LoraConfig
from parallel.config import OptimConfig
from training.config import DVAETrain, LoopConfig, PriorTrain
from training.run.resume import accept_config, refuse_misfits
from training.run.resume_with import with_changes
from training.tasks.dvae_config import DiscriminatorConfig, PerceptualConfig


def _config(stage: str, settings: Any) -> dict[str, Any]:
    return {"stage": stage, **to_json(settings)}


def _checkpoint(folder: Path, config: dict[str, Any]) -> CheckpointReader:
    """A trained matrix `w` and a frozen one, `f`."""
    data = torch.zeros(6, device="cpu")
    kinds = {"w": ("master", "exp_avg", "exp_avg_sq"), "f": ("master",)}
    slices = [
        StateSlice(name=name, kind=kind, shape=(2, 3), start=0, data=data)
        for name in kinds
        for kind in kinds[name]
    ]
    slices.append(StateSlice(name="w", kind="step", shape=(), start=0, data=data[:1]))
    store, facts = FolderStore(folder), {"stage": config["stage"], "step": 2, "config": config}
    write_checkpoint(store, "step-2", slices, facts, 0, lambda text: [text])
    return CheckpointReader(store, "step-2")


@pytest.mark.parametrize(
    ("stage", "before", "changes"),
    [
        ("dvae", DVAETrain(), {"model": DVAEConfig(levels=(5, 5), vector=3)}),
        ("dvae", DVAETrain(), {"commitment": 1.0, "discriminator": DiscriminatorConfig(width=8)}),
        (
            "dvae",
            DVAETrain(model=DVAEConfig(quantizer="vq")),
            {"model": DVAEConfig(quantizer="vq", levels=(3,)), "tau_last": 0.5, "beta": 1.0},
        ),
        (
            "dvae",
            DVAETrain(perceptual=PerceptualConfig(weight=1.0, vgg=Path("a/v"), linear=Path("a/l"))),
            {"perceptual": PerceptualConfig(weight=1.0, vgg=Path("b/v"), linear=Path("b/l"))},
        ),
        ("prior", PriorTrain(), {"loop": LoopConfig(stop_at=3, log_every=1, validate_every=5)}),
        ("prior", PriorTrain(), {"loop": LoopConfig(validation_samples=64)}),
        ("dvae", DVAETrain(), {"rfid": Path("i.safetensors"), "init_bpe": Path("b")}),
        ("prior", PriorTrain(), {"lora": LoraConfig(alpha=3.0), "optim": OptimConfig(patience=9)}),
        ("prior", PriorTrain(), {"optim": OptimConfig(ema_every=1)}),
    ],
)
def test_what_changes_nothing_does_not_hinder_a_resume(
    tmp_path: Path, stage: str, before: Any, changes: dict[str, Any]
) -> None:
    reader = _checkpoint(tmp_path, _config(stage, before))
    assert accept_config(reader, _config(stage, replace(before, **changes))) == []


@pytest.mark.parametrize(
    ("before", "now", "setting"),
    [
        (DVAEConfig(quantizer="vq"), DVAEConfig(quantizer="vq", vector=3), "model.vector"),
        (
            DVAEConfig(quantizer="fsq"),
            DVAEConfig(quantizer="fsq", levels=(4, 8, 16)),
            "model.levels",
        ),
        (DVAEConfig(), DVAEConfig(quantizer="vq"), "model.quantizer"),
    ],
)
def test_what_changes_the_run_is_refused(
    tmp_path: Path, before: DVAEConfig, now: DVAEConfig, setting: str
) -> None:
    reader = _checkpoint(tmp_path, _config("dvae", DVAETrain(model=before)))
    with pytest.raises(ConfigError, match=setting):
        accept_config(reader, _config("dvae", DVAETrain(model=now)))


def test_another_step_of_the_average_is_refused(tmp_path: Path) -> None:
    before = PriorTrain(optim=OptimConfig(ema=0.5))
    now = PriorTrain(optim=OptimConfig(ema=0.5, ema_every=3))
    with pytest.raises(ConfigError, match="ema_every"):
        accept_config(_checkpoint(tmp_path, _config("prior", before)), _config("prior", now))


def test_an_average_begins_on_purpose(tmp_path: Path) -> None:
    """Settings that had no effect before need not be named, and are noted if they are."""
    reader = _checkpoint(tmp_path, _config("prior", PriorTrain()))
    for purpose, noted in (("optim.ema=0.5", 1), ("optim.ema=0.5,optim.ema_every=3", 2)):
        optim = OptimConfig(ema=0.5, ema_every=3)
        now = PriorTrain(optim=optim, resume_with=purpose)
        assert len(accept_config(reader, _config("prior", now))) == noted


def test_settings_that_may_change_are_noted_if_they_change_on_purpose(tmp_path: Path) -> None:
    reader = _checkpoint(tmp_path, _config("prior", PriorTrain()))
    purpose = "data=b,checkpoint.keep=7,loop.log_every=10"
    now = with_changes(PriorTrain(resume_with=purpose))
    rows = [
        (e["setting"], e["before"], e["now"]) for e in accept_config(reader, _config("prior", now))
    ]
    keep = PriorTrain().checkpoint.keep
    assert rows == [("checkpoint.keep", keep, 7), ("data", "data/tokens", "b")], "not what is equal"


def test_a_discriminator_is_not_added_on_purpose(tmp_path: Path) -> None:
    reader = _checkpoint(tmp_path, _config("dvae", DVAETrain()))
    critic = DiscriminatorConfig(weight=0.1)
    now = DVAETrain(discriminator=critic, resume_with="discriminator.weight=0.1")
    with pytest.raises(ConfigError, match=r"weight=0\.1 adds a discriminator.*--init .*step-2"):
        accept_config(reader, _config("dvae", now))
    less = _checkpoint(tmp_path / "b", _config("dvae", replace(now, resume_with="")))
    weaker = replace(now, discriminator=DiscriminatorConfig(weight=0.05))
    weaker = replace(weaker, resume_with="discriminator.weight=0.05")
    (event,) = accept_config(less, _config("dvae", weaker))
    assert (event["before"], event["now"]) == (0.1, 0.05)


def test_tensors_that_a_checkpoint_lacks_are_named_in_words(tmp_path: Path) -> None:
    reader = _checkpoint(tmp_path, _config("prior", PriorTrain(freeze="f")))
    refuse_misfits(reader, {"w": (2, 3), "f": (2, 3)}, frozenset("f"))
    refuse_misfits(reader, {"w": (2, 3), "f": (2, 3)}, frozenset("wf"))
    with pytest.raises(ConfigError) as refused:
        refuse_misfits(reader, {"w": (2, 4), "v": (3,)}, frozenset())
    told = "v is absent there and 3 here, w is 2 x 3 there and 2 x 4 here"
    assert told in str(refused.value) and "--init" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        refuse_misfits(reader, {"w": (2, 3), "f": (2, 3)}, frozenset())
    told = "no moments of 1 tensors that its run froze (f)"
    assert told in str(refused.value) and "give freeze='f'" in str(refused.value)
    many = dict.fromkeys("abcd", (2,))
    with pytest.raises(ConfigError, match=r"c is absent there and 2 here, \.\.\. 4 in all"):
        refuse_misfits(reader, many, frozenset())
