"""The registry of suites; each is imported on demand. Imports no torch itself.

A new suite needs a settings class, a module with a function `prepare(inputs, settings, prompts)`
that returns a `Prepared` (protocol.py), one that checks prompts (prompts.py), and a row here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from core.errors import InputError, did_you_mean
from core.files.atomic import Json
from data_pipeline.evaluation_sets import COCO, CUB
from generation.config import SampleConfig
from generation.evaluation.suites.config import (
    BestOfNConfig,
    ClipscoreConfig,
    FidConfig,
    GenevalConfig,
    PanelsConfig,
    ShapesConfig,
)
from generation.evaluation.suites.prompts import (
    caption_problems,
    judged_problems,
    panel_problems,
    pictured_problems,
    shapes_problems,
    task_problems,
)

KEYS = "candidate c of a caption is drawn by the key (settings.seed, caption, c)"
_PACKAGE = "generation.evaluation.suites"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One evaluation that can be repeated from its suite.json."""

    text: str
    """One line for --help."""
    settings: type[SampleConfig]
    """Its settings, whose fields are flags of `tapir evaluate --suite NAME`."""
    prepare: str
    """`module:function` that opens its data and chooses its prompts."""
    problems: Callable[[list[Json]], list[str]]
    """Problems of prompts, its own or those of a file."""
    data: str = ""
    """What DATA is; empty if it reads none."""
    source: str = ""
    """Source that `tapir pack` must have packed into DATA; empty = any."""
    count: str = ""
    """The setting that says how many prompts are chosen; a file has its own prompts."""
    repeats_without_data: bool = True
    """True if its prompts are all that it takes from DATA, so that its file is enough to repeat."""
    keys: str = KEYS
    """The rule of the random keys, for people who draw the same pictures elsewhere."""
    ranks: bool = True
    """False if its candidates are not ranked, so that no CLIP is opened."""
    workers: bool = False
    """True if several workers (--worker i/n) share it."""
    averages: tuple[str, ...] = ()
    """Settings that only decide how finished draws are averaged; OUT may be measured again with
    others."""
    lower_is_better: bool = False
    """The order of its first figure in the leaderboard."""


SUITES = {
    "shapes": Suite(
        text="held-out captions of shapes: exact, count, colour, size, shape, position, best of N",
        settings=ShapesConfig,
        prepare=f"{_PACKAGE}.shapes:prepare",
        problems=shapes_problems,
        data="a packed set of shapes",
        source="shapes",
        count="prompts",
    ),
    "geneval-style": Suite(
        text="shapes by task as in GenEval: one object, two, counting, colours, size, position",
        settings=GenevalConfig,
        prepare=f"{_PACKAGE}.geneval:prepare",
        problems=task_problems,
        count="per_task",
        ranks=False,
    ),
    "clipscore": Suite(
        text="CLIPScore of any captions, by a local open_clip checkpoint (--judge)",
        settings=ClipscoreConfig,
        prepare=f"{_PACKAGE}.clipscore:prepare",
        problems=judged_problems,
        count="captions",
        data="coco:DIR, cub:DIR or a packed set",
    ),
    "coco": Suite(
        text="FID and IS on MS-COCO, by blur; a job of workers",
        settings=FidConfig,
        prepare=f"{_PACKAGE}.fid:prepare_coco",
        problems=pictured_problems,
        data="coco:DIR",
        count="captions",
        repeats_without_data=False,
        workers=True,
        lower_is_better=True,
    ),
    "cub": Suite(
        text="FID and IS on CUB, by blur; a job of workers",
        settings=FidConfig,
        prepare=f"{_PACKAGE}.fid:prepare_cub",
        problems=pictured_problems,
        data="cub:DIR",
        count="captions",
        repeats_without_data=False,
        workers=True,
        lower_is_better=True,
    ),
    "pairs": Suite(
        text="FID and IS on the validation split of a packed set; a job of workers",
        settings=FidConfig,
        prepare=f"{_PACKAGE}.fid:prepare_pairs",
        problems=pictured_problems,
        data="a packed set",
        count="captions",
        repeats_without_data=False,
        workers=True,
        lower_is_better=True,
    ),
    "best-of-n": Suite(
        text="figures 6 and 9c: accuracy (of shapes), FID and IS against N = 1 to 512 candidates",
        settings=BestOfNConfig,
        prepare=f"{_PACKAGE}.best_of_n:prepare",
        problems=caption_problems,
        data="coco:DIR, cub:DIR or a packed set",
        count="captions",
        repeats_without_data=False,
        averages=("repeats",),
        lower_is_better=True,
    ),
    "panels": Suite(
        text="figure 14: the upper panel below, changed; exact by operation, and a control",
        settings=PanelsConfig,
        prepare=f"{_PACKAGE}.panels:prepare",
        problems=panel_problems,
        data="a packed set of panels",
        source="panels",
        count="per_operation",
        keys=(
            "candidate c of a prompt is drawn by the key (settings.seed, caption, top as 'COLOUR "
            "FORM at ROW,COLUMN', c), also with another upper panel"
        ),
        ranks=False,
    ),
}


def suite_called(name: str) -> Suite:
    """The suite of a name. Raises: InputError with the nearest known name."""
    if name not in SUITES:
        hint = did_you_mean(name, SUITES)
        raise InputError(
            f"there is no suite {name!r}{hint} (known: {', '.join(SUITES)}; or the path of a "
            "suite.json)"
        )
    return SUITES[name]


def suite_of(data: str) -> str:
    """The suite that `tapir score DATA` means."""
    return next((name.rstrip(":") for name in (COCO, CUB) if data.startswith(name)), "pairs")
