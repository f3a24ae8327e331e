"""Flags that runs of earlier versions lack are read by submit, rehearse and plan as by train."""

import json
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, get_args, get_origin

import pytest

from cli.cluster import submit
from core.errors import ConfigError
from core.flags import parse_over
from core.known_flags import flag_text, known_flags
from models.config import PriorConfig
from planning.config import DVAEFlags, ModelFlags, PlanFlags
from planning.dvae import dvae_parameters
from planning.plan import planned_settings
from planning.rehearse_presets import laid_out
from tests.harness import ROOT
from tests.unit.workflow.test_needs import run_file
from training.presets import PRESETS
from training.run.resume_with import with_changes
from training.stages import config_with_new_names
from workflow.chain.stages import settings_of_stages
from workflow.run_file import read_runfile
from workflow.run_flags import Value, arguments_of

BEFORE = ROOT / "tests" / "golden" / "before"
"""Runs of an earlier version, whose config.json have its settings."""
STAGES = ("dvae", "prior", "clip")
GIVEN: dict[str, Value] = {"resume_with": "loop.log_every=3", "track": "tensorboard,wandb"}
"""Flags that do not take any value of their type."""
TOGETHER: dict[str, Value] = {
    "mesh.tensor": 2,
    "mesh.sequence_parallel": True,
    "mesh.pipeline": 2,
    "engine.name": "torch",
    "engine.schedule": "interleaved",
    "engine.virtual_stages": 2,
    "engine.reduce_precision": "16-bit",
}
"""Flags that need others; only a prior has tensor ranks and stages."""


def new_flags(stage: str) -> dict[str, Value]:
    """The flags of a stage that its earlier run lacks, each with another value than the preset."""
    path = BEFORE / stage / "config.json"
    old = config_with_new_names(json.loads(path.read_text()), str(path))
    preset = PRESETS[stage]["tiny"]()
    return {
        name: GIVEN.get(name, _other(kind, _setting(preset, name)))
        for name, kind in known_flags(type(preset)).types.items()
        if not _has(old, name.split(".")) and name not in TOGETHER
    } | (TOGETHER if stage == "prior" else {})


def _has(body: Any, names: list[str]) -> bool:
    return not names or (names[0] in body and _has(body[names[0]], names[1:]))


def _setting(settings: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), settings)


def _other(kind: Any, value: Any) -> Any:
    """A value of a flag that differs from another one."""
    if kind is bool:
        return not value
    if kind is int:
        return value - 1 if value > 1 else value + 1
    if kind is float:
        return value / 2 or 0.5
    if get_origin(kind) is tuple:
        return [number + 1 for number in value]
    return next(choice for choice in (*get_args(kind), "other") if choice != value)


@pytest.mark.parametrize("stage", STAGES)
def test_submit_and_rehearse_read_new_flags_as_train_does(
    stage: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, preset = new_flags(stage), PRESETS[stage]["tiny"]()
    assert {"init", "freeze", "resume_with"} <= flags.keys()
    arguments = arguments_of(flags)
    trained = parse_over(preset, arguments, "train")
    assert all(str(_setting(trained, n)) != str(_setting(preset, n)) for n in flags)
    file = run_file(tmp_path, **{stage: {"flags": flags}})
    submitted = settings_of_stages(read_runfile(file))[stage]
    submit([str(file), "--dry-run"])
    printed = capsys.readouterr().out
    (rehearsed,), _ = laid_out([(stage, "tiny")], arguments, 4 if stage == "prior" else 2)
    for name in flags:
        assert flag_text(name) in printed
        value = _setting(trained, name)
        assert _setting(submitted, name) == _setting(rehearsed[2], name) == value, name
    for settings in (with_changes(trained), submitted, rehearsed[2]):
        assert settings.loop.log_every == 3


def test_plan_has_every_option_of_a_prior() -> None:
    """Those that change its layers or its grid, and are no size of the paper's presets."""
    options = {
        name: kind
        for name, kind in known_flags(PriorConfig).types.items()
        if kind is bool or get_origin(kind) is Literal or name == "columns"
    }
    assert known_flags(ModelFlags, flat=True).types == options, "switches need no value"
    given: dict[str, Any] = {
        name: 7 if name == "columns" else _other(kind, False) for name, kind in options.items()
    }
    made = ModelFlags(**given).applied(PriorConfig())
    assert {name: getattr(made, name) for name in options} == given


def test_plan_has_every_option_of_a_dvae() -> None:
    """Those of its network, and its optional losses."""
    new = new_flags("dvae")
    options = {name.removeprefix("model.") for name in new if name.startswith("model.")}
    losses = {name for name in new if name.endswith(".weight")}
    assert set(known_flags(DVAEFlags, flat=True).types) == options | losses | {"codebook"}
    plain = planned_settings(PlanFlags(preset="paper_dvae"))
    fsq = DVAEFlags(
        quantizer="fsq",
        codebook=1024,
        levels=(8, 8, 16),
        perceptual_weight=1.0,
        discriminator_weight=0.1,
    )
    chosen = planned_settings(PlanFlags(preset="paper_dvae", dvae=fsq))
    assert (chosen.model.quantizer, chosen.model.levels) == ("fsq", (8, 8, 16))
    assert chosen.model.codebook == 1024 and dvae_parameters(chosen.model) < 0.9 * dvae_parameters(
        plain.model
    )
    assert (chosen.perceptual.weight, chosen.discriminator.weight) == (1.0, 0.1)
    wide = planned_settings(
        PlanFlags(preset="paper_dvae", dvae=DVAEFlags(quantizer="vq", vector=16))
    )
    assert wide.model.vector == 16 and wide.model.codebook == plain.model.codebook
    assert wide.model_problems() == [], "the preset's model.init suits gumbel alone"
    with pytest.raises(ConfigError, match=r"try --model\.codebook 1024"):  # as train refuses it
        planned_settings(PlanFlags(preset="paper_dvae", dvae=replace(fsq, codebook=None)))
    for preset, flags in (
        ("paper_12b", {"dvae": fsq}),
        ("paper_dvae", {"model": ModelFlags(tied=True)}),
    ):
        (problem,) = PlanFlags(preset=preset, **flags).problems()  # type: ignore[arg-type]
        assert problem.endswith("leave its options out")


def test_options_that_are_not_given_stay_the_presets() -> None:
    plain = planned_settings(PlanFlags(preset="paper_dvae"))
    chosen = replace(plain, discriminator=replace(plain.discriminator, weight=0.1))
    assert DVAEFlags().applied(chosen) == chosen
    assert DVAEFlags(discriminator_weight=0.0).applied(chosen) == plain
    levels = DVAEFlags(levels=(8, 8, 8)).applied(plain).model
    assert levels.codebook == plain.model.codebook, "a Gumbel's codes are not its levels"
