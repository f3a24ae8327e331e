"""Settings that a resumed run changes on purpose: `--resume-with optim.lr=1e-4,loop.steps=2000`.

Imports no torch.
"""

import json
import re
from typing import Any, TypeVar

from core.config import from_json, to_json, wrong_types
from core.errors import did_you_mean

T = TypeVar("T")
_SHAPES = "the checkpoint's tensors have these shapes; start a new run with --init"
_COMPUTES = "the weights were trained to compute with it; start a new run with --init"
_LOSS = "losses before and after would not compare; start a new run with --init"
_WHY = {
    "model": _SHAPES,
    **dict.fromkeys(
        (f"model.{name}" for name in ("heads", "conv_kernel", "gain", "quantizer", "epsilon")),
        _COMPUTES,
    ),
    "model.text_weight": _LOSS,
    "model.min_log_scale": _LOSS,
    "model.init": "it acts on the weights before step 1 alone; start a new run",
    "order": "the data order follows from it; start a new run with --init",
    "loop.seed": "the data order follows from it; start a new run with --init",
    "loop.global_batch_size": "the position in the data counts batches; start a new run with "
    "--init",
    "lora.rank": _SHAPES,
    "discriminator.width": _SHAPES,
    "discriminator.layers": _SHAPES,
    "out": "give it as --out",
    "resume_with": "it is the flag itself",
}
"""Settings, and groups of settings, that no run can change -> why, and what to do instead."""


_NEXT = re.compile(r",+(?=[^,=]*=)")
"""What separates two settings: values of their own may hold commas, but no = after one."""


def changes_of(text: str) -> dict[str, Any]:
    """`a.b=1,c=x` -> {"a.b": 1, "c": "x"}; values as JSON, else as text; the last of a name counts.

    Parts that are not SETTING=VALUE are left out: `resume_with_problems` names them.
    """
    return dict(_changes(text)[0])


def _changes(text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Names with their values, and the parts that are not SETTING=VALUE."""
    changes: list[tuple[str, Any]] = []
    malformed = []
    for part in filter(None, _NEXT.split(text.strip(","))):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            malformed.append(part)
            continue
        try:
            changes.append((name, json.loads(value)))
        except ValueError:
            changes.append((name, value))
    return changes, malformed


def resume_with_problems(settings: Any) -> list[str]:
    """Problems of `settings.resume_with`: its form, its names and its types."""
    given, malformed = _changes(settings.resume_with)
    names, changes = [name for name, _ in given], dict(given)
    known = leaves(to_json(settings))
    problems = [
        f"resume_with: {part!r} is not SETTING=VALUE; write e.g. optim.lr=1e-4,loop.steps=2000"
        for part in malformed
    ]
    for name, value in changes.items():
        if names.count(name) > 1:
            problems.append(f"resume_with: {name} is given {names.count(name)} times; give it once")
        if reason := _WHY.get(name) or _WHY.get(name.partition(".")[0]):
            problems.append(f"resume_with: {name} cannot change: {reason}")
        elif name not in known:
            problems.append(f"resume_with: there is no setting {name!r}{did_you_mean(name, known)}")
        else:
            body: dict[str, Any] = {}
            _set(body, name, value)
            problems += wrong_types(type(settings), body, "resume_with")
    return problems


def with_changes(settings: T) -> T:
    """The settings with the changes of their `resume_with`.

    They are not changed if `resume_with_problems` has problems, which `settings.problems()` names
    beside all others.
    """
    if resume_with_problems(settings):
        return settings
    body = to_json(settings)
    for name, value in changes_of(body["resume_with"]).items():
        _set(body, name, value)
    return from_json(type(settings), body)


def _set(body: dict[str, Any], name: str, value: Any) -> None:
    """Set a value by its dotted name."""
    *groups, last = name.split(".")
    for group in groups:
        body = body.setdefault(group, {})
    body[last] = value


def leaves(body: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name."""
    settings: dict[str, Any] = {}
    for name, value in body.items():
        nested = isinstance(value, dict)
        settings |= leaves(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return settings
