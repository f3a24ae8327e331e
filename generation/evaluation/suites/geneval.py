"""The suite geneval-style: single samples of shapes, by task, as GenEval does with photographs.

Its tasks, its four unranked pictures of a prompt and its mean over tasks are GenEval's; prompts are
captions of the shapes generator, and the checker stands for its object detector. The task `size` is
not in GenEval. Figures are not comparable with published ones.
Source: arXiv 2310.11513, section 3.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np

from core.files.atomic import Json
from core.keys import key_int
from data_pipeline.sources.drawn.shapes import (
    COLOURS,
    EXTENT,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    parse_caption,
)
from generation.evaluation.accuracy import derangement, draw_all
from generation.evaluation.suites.config import GenevalConfig
from generation.evaluation.suites.criteria import TASKS, Task
from generation.evaluation.suites.protocol import Inputs, Measured
from generation.evaluation.suites.shapes import Judged, objects_by_draw
from generation.text_to_image import Studio


class GenevalSuite:
    """Prompts by task."""

    def __init__(self, prompts: list[Json], settings: GenevalConfig) -> None:
        self.prompts, self._settings = prompts, settings
        self.facts: Json = {}

    def measure(self, studio: Callable[[], Studio]) -> Measured:
        opened, captions = studio(), list(dict.fromkeys(row["caption"] for row in self.prompts))
        opened.tell_cut(captions)
        drawn = draw_all(opened, captions, self._settings.draws, "sample")
        objects = {row.caption: objects_by_draw(row) for row in drawn}
        rows = [self._row(name, task, objects) for name, task in TASKS.items()]
        rows = [row for row in rows if row["prompts"]]
        overall = float(np.mean([row["correct"] for row in rows]))
        results = {"candidates": self._settings.candidates, "overall": overall, "rows": rows}
        figures = {row["task"]: float(row["correct"]) for row in rows}
        return Measured(results=results, headline={"overall": overall, **figures})

    def _row(self, name: str, task: Task, objects: dict[str, Judged]) -> Json:
        """The fraction of all pictures of a task's prompts that solve it, and of shuffled ones."""
        captions = [row["caption"] for row in self.prompts if row["task"] == name]
        if not captions:
            return {"task": name, "prompts": 0}
        order = derangement(len(captions), self._settings.seed)
        shuffled = [captions[i] for i in order]
        return {
            "task": name,
            "prompts": len(captions),
            "pictures": len(captions) * self._settings.candidates,
            "correct": _correct(task, captions, captions, objects),
            "chance": _correct(task, shuffled, captions, objects),
        }


def prepare(inputs: Inputs, settings: GenevalConfig, prompts: list[Json] | None) -> GenevalSuite:
    """Choose captions of each task by key, or take those of a file."""
    if prompts is None:
        prompts = [
            {"task": name, "caption": caption}
            for name, task in TASKS.items()
            for caption in chosen(task, name, settings.per_task, settings.seed)
        ]
    return GenevalSuite(prompts, settings)


def chosen(task: Task, name: str, count: int, seed: int) -> list[str]:
    """Captions of a task, chosen by key, in key order."""
    captions = [scene.caption for scene in _scenes() if task.suits(scene)]
    return sorted(captions, key=lambda caption: key_int(seed, caption, f"geneval/{name}"))[:count]


def _scenes() -> Iterator[Scene]:
    """Every scene of the shapes generator."""
    things = [
        Thing(size=size, colour=colour, shape=shape)
        for size, colour, shape in product(EXTENT, COLOURS, SHAPES)
    ]
    for first in things:
        yield Scene(first=first)
        for relation, second in product(RELATIONS, things):
            yield Scene(first=first, relation=relation, second=second)


def _correct(
    task: Task, captions: Sequence[str], drawn_for: Sequence[str], objects: dict[str, Judged]
) -> float:
    """The fraction of the pictures drawn for some captions that solve the task for these."""
    pairs = zip(captions, drawn_for, strict=True)
    return float(
        np.mean(
            [
                task.holds(parse_caption(caption), seen)
                for caption, other in pairs
                for seen in objects[other]
            ]
        )
    )
