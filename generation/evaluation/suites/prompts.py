"""Prompts of a suite, checked before a model is opened; imports no torch."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from core.errors import InputError, did_you_mean
from core.files.atomic import Json
from data_pipeline.sources.drawn.panels import Panel, operation_of, panel_of
from data_pipeline.sources.drawn.shapes import parse_caption
from generation.evaluation.suites.criteria import TASKS

SHOWN = 20
"""Problems of single prompts that a message lists."""
Fields = Mapping[str, Callable[[Any], object]]
"""Fields of a row, each with a function that raises InputError for a wrong value."""


def caption_problems(prompts: list[Json]) -> list[str]:
    """Problems of captions of any text, which have no control."""
    return _row_problems(prompts, {"caption": _text})


def pictured_problems(prompts: list[Json]) -> list[str]:
    """Problems of captions with the pictures that theirs are compared with."""
    return _row_problems(prompts, {"caption": _text, "pictures": _texts})


def judged_problems(prompts: list[Json]) -> list[str]:
    """Problems of captions of any text, which are shuffled for `chance`."""
    return caption_problems(prompts) or _few("the suite", prompts)


def shapes_problems(prompts: list[Json]) -> list[str]:
    """Problems of captions of the shapes generator."""
    problems = _row_problems(prompts, {"caption": _of_shapes})
    return problems or _few("the suite", prompts)


def task_problems(prompts: list[Json]) -> list[str]:
    """Problems of captions of the shapes generator with a task of geneval-style."""
    problems = _row_problems(prompts, {"caption": _of_shapes, "task": _task})
    problems = problems or _shortened(
        f"prompts[{i}]: {row['caption']!r} is no caption for the task {row['task']!r}"
        for i, row in enumerate(prompts)
        if not TASKS[row["task"]].suits(parse_caption(row["caption"]))
    )
    by_task: dict[str, list[Json]] = {} if prompts else {"": []}
    for row in [] if problems else prompts:
        by_task.setdefault(row["task"], []).append(row)
    few = [text for task, rows in by_task.items() for text in _few(f"the task {task!r}", rows)]
    return problems or few


def panel_problems(prompts: list[Json]) -> list[str]:
    """Problems of captions of the panels generator with an upper panel each."""
    needed: Fields = {"caption": _of_panels, "top": panel_of}
    problems = _row_problems(prompts, needed, {"key": _text})
    if problems:
        return problems
    tops: dict[str, list[Panel]] = {} if prompts else {"": []}
    for row in prompts:
        tops.setdefault(operation_of(row["caption"]), []).append(panel_of(row["top"]))
    return [
        f"prompts: {name or 'every operation'}: the prompts must be two or more, with different "
        "upper panels, so that they can be swapped; add prompts, or pack more panels"
        for name, panels in tops.items()
        if len(set(panels)) < max(len(panels), 2)
    ]


def _row_problems(prompts: list[Json], needed: Fields, optional: Fields | None = None) -> list[str]:
    """Fields of rows that are missing, unknown or refused by the function that reads them."""
    known, problems = {**needed, **(optional or {})}, []
    for i, row in enumerate(prompts):
        where = f"prompts[{i}]"
        if not isinstance(row, dict):
            names = ", ".join(needed)
            problems.append(f"{where}={row!r} must be a mapping of {names}")
            continue
        problems += [f"{where}: {name} is missing" for name in needed if name not in row]
        for name, value in row.items():
            if name not in known:
                hint = did_you_mean(name, known) or f" (known: {', '.join(known)})"
                problems.append(f"{where}: unknown {name!r}{hint}")
                continue
            try:
                known[name](value)
            except InputError as error:
                problems.append(f"{where}.{name}: {error}")
    return _shortened(problems)


def _few(what: str, prompts: list[Json]) -> list[str]:
    """A problem if not every prompt can be exchanged for another one."""
    counts = Counter(row["caption"] for row in prompts)
    if len(counts) < 2:
        return [
            f"prompts: {what} needs at least 2 different captions, and has {len(counts)}: `chance` "
            "is the figure of shuffled captions; give another prompt"
        ]
    return _shortened(
        f"prompts: {what} has {caption!r} {count} times: `chance` is the figure of shuffled "
        "captions, and this one could stand for itself; give it once"
        for caption, count in counts.items()
        if count > 1
    )


def _shortened(problems: Iterable[str]) -> list[str]:
    """The first problems, and the number of the others."""
    problems = list(problems)
    rest = len(problems) - SHOWN
    return problems[:SHOWN] + [f"prompts: {rest} further problems"] * (rest > 0)


def _text(value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{value!r} must be a text")


def _texts(value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{value!r} must be a list of texts")


def _of_shapes(value: Any) -> None:
    _text(value)
    parse_caption(value)


def _of_panels(value: Any) -> None:
    _text(value)
    operation_of(value)


def _task(value: Any) -> None:
    if not isinstance(value, str) or value not in TASKS:
        raise InputError(f"{value!r} is no task; geneval-style has {', '.join(TASKS)}")
