"""Flags are known as tyro knows them; a wrong one gets the right spelling, on every verb."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cli.serving.study import PARTS
from cluster.launcher import call_target
from core.errors import ConfigError, InputError, joined
from core.flags import parse, parse_over
from core.known_flags import KnownFlags, flag_text, known_flags
from tapir import VERBS
from training.presets import PRESETS

NO_PARSER = {"train", "rehearse", "study"}
"""They parse their presets' flags, and their own are few; study has parts, which are tested."""


class _Seen(Exception):
    """Carries the arguments of `parse`."""


def parser_of(target: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The function whose parameters are the flags of a verb's `module:function`."""
    module = target.partition(":")[0]

    def caught(function: Callable[..., Any], *_: Any) -> None:
        raise _Seen(function)

    with monkeypatch.context() as patched:
        patched.setattr(f"{module}.parse", caught)
        with pytest.raises(_Seen) as seen:
            call_target(target, [])
    function: Callable[..., Any] = seen.value.args[0]
    return function


def shown(call: Callable[[list[str]], Any]) -> set[str]:
    """The flags that tyro's help shows."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        call(["--help"])
    lines = re.findall(
        r"^  (?:-\w, )?(--[a-z][\w.-]*(?:, --[\w.-]+)*)", output.getvalue(), re.MULTILINE
    )
    return {flag for line in lines for flag in line.split(", ")} - {"--help"}


def spelled(known: KnownFlags) -> set[str]:
    """Every right spelling of the flags."""
    flags = {flag_text(name) for name in known.types}
    return flags | {flag_text(name, True) for name, kind in known.types.items() if kind is bool}


@pytest.mark.parametrize("verb", sorted(set(VERBS) - NO_PARSER))
def test_every_flag_of_a_verb_is_known(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = parser_of(VERBS[verb][0], monkeypatch)
    assert spelled(known_flags(function, flat=True)) == shown(lambda a: parse(function, a, verb))


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_flag_of_a_part_of_study_is_known(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = parser_of(f"cli.serving.study:{part}", monkeypatch)
    assert spelled(known_flags(function, flat=True)) == shown(lambda a: parse(function, a, part))


def presets() -> Iterator[Any]:
    """The settings of each stage's smallest preset."""
    for stage in PRESETS:
        yield PRESETS[stage]["tiny"]()


@pytest.mark.parametrize("settings", presets(), ids=lambda one: type(one).__name__)
def test_every_flag_of_a_stage_is_known(settings: Any) -> None:
    known = known_flags(type(settings))
    assert len(known.types) > 5
    assert spelled(known) == shown(lambda a: parse_over(settings, a, "train"))


@pytest.mark.parametrize(
    ("stage", "flags", "answer"),
    [
        ("prior", "--no-checkpoint.async-save", "mean '--checkpoint.no-async-save'?"),
        ("prior", "--no-checkpoint.background", "mean '--checkpoint.no-async-save'?"),
        ("prior", "--no-checkpoint.backgroumd", "mean '--checkpoint.no-async-save'?"),
        ("prior", "--checkpoint.backgroumd", "mean '--checkpoint.async-save'?"),
        ("prior", "--checkpoint.no_asinc_save", "mean '--checkpoint.no-async-save'?"),
        ("prior", "--no-async-save", "mean '--checkpoint.no-async-save'?"),
        ("prior", "--lop.batch 3", "mean '--loop.global-batch-size'?"),
        ("prior", "--lr 3", "mean '--optim.lr'?"),
        ("dvae", "--model.least_log_scal=3", "mean '--model.min-log-scale'?"),
        ("prior", "--checkpoint.async-save=false", "write --checkpoint.no-async-save"),
        ("prior", "--checkpoint.no-async-save False", "write --checkpoint.async-save"),
        ("prior", "--checkpoint.async_save true", "no value; write --checkpoint.async-save"),
        ("prior", "--xyzzy", "has no flag --xyzzy; `tapir train prior --help` lists them"),
    ],
)
def test_a_wrong_flag_gets_the_right_spelling(stage: str, flags: str, answer: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_over(PRESETS[stage]["tiny"](), flags.split(), f"train {stage}")
    assert str(raised.value).endswith(answer) and raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("verb", "flags", "answer"),
    [
        ("sample", "a --no-rernak", "mean '--no-rerank'?"),
        ("evaluate", "data --moost 3", "mean '--max-candidates'?"),
        ("plan", "tiny --cost_huor 2", "mean '--cost-per-hour'?"),
        ("import", "a b --form x", "mean '--from'?"),
        ("submit", "run.yaml --no-drry-run", "mean '--no-dry-run'?"),
        ("submit", "run.yaml --wait=0", "write --no-wait"),
        ("rehearse", "tiny --wrld 3", "mean '--world'?"),
    ],
)
def test_a_wrong_flag_of_a_verb_gets_the_right_spelling(verb: str, flags: str, answer: str) -> None:
    with pytest.raises(InputError, match=re.escape(answer)):
        call_target(VERBS[verb][0], flags.split())


def test_all_wrong_flags_are_named_at_once() -> None:
    with pytest.raises(InputError) as raised:
        parse_over(PRESETS["prior"]["tiny"](), ["--lr=3", "--loop.steps=2", "--x.y"], "train")
    lines = str(raised.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("- ") and "--x.y" in lines[1]


def test_values_and_what_follows_two_dashes_are_no_flags() -> None:
    def run(names: tuple[str, ...] = (), on: bool = False) -> tuple[tuple[str, ...], bool]:
        return names, on

    assert parse(run, ["--names", "a", "no", "--on"], "x") == (("a", "no"), True)
    assert parse(run, ["--names=--odd"], "x") == (("--odd",), False)


def test_one_problem_has_no_bullet() -> None:
    assert str(ConfigError.from_problems(["a"])) == "a"
    assert str(ConfigError.from_problems(["a", "b"])) == joined(["a", "b"]) == "- a\n- b"
    assert str(ConfigError("a").of_file("x.yaml")) == "x.yaml: a"
    assert str(ConfigError("- a\n- b").of_file("x.yaml")) == "x.yaml:\n- a\n- b"
