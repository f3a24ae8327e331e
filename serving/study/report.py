"""`tapir study results`: results.json and a self-contained results.html that works from file://."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from core.errors import InputError
from core.files.atomic import Json, canonical_json, write_atomic
from data_pipeline.images.crops import encode_png
from serving.study.pixels import Encoded, decoded
from serving.study.results import study_results
from serving.study.study import PICTURES, Study, picture_file, read_study
from serving.study.votes import Votes

JSON, PAGE = "results.json", "results.html"
PAGES = Path(__file__).with_name("pages")
SHOWN = 60
"""Captions whose pictures are in the page."""
_SIDE = 256
"""Longest side of a picture in the page, in pixels."""
TITLES = {"realism": "More realistic", "match": "Matches the caption better"}
CHOICES = {"a": "A", "b": "B", "neither": "neither", "none": "no majority"}


def write_results(folder: Path, without: tuple[int, ...] = ()) -> Json:
    """Compute the figures of a study, while it runs or after, and write both files into it.

    Raises: InputError if there is no study, or no such rater.
    """
    study = read_study(folder)
    votes = Votes(folder, study)
    try:
        rows, raters = votes.all(), votes.raters()
    finally:
        votes.close()
    unknown = sorted(set(without) - set(raters))
    if unknown:
        raise InputError(f"--without {unknown[0]}: the study has the raters 1 to {len(raters)}")
    body = study_results(study, rows, raters, without)
    write_atomic(folder / JSON, canonical_json(body))
    write_atomic(folder / PAGE, _page(folder, study, body).encode("utf-8", "backslashreplace"))
    return body


def findings(body: Json) -> list[str]:
    """A sentence for each question, and one about missing votes."""
    missing, lines = body["missing"], [_finding(*part) for part in body["questions"].items()]
    if missing["votes"]:
        lines.append(
            f"{missing['votes']} votes are missing, on {missing['captions']} captions. Raters give "
            f"them by their links, or {missing['raters']} new ones (tapir study links)."
        )
    return lines


def _finding(name: str, part: Json) -> str:
    if not part["captions"]:
        return f"{TITLES[name]}: no caption has enough votes yet."
    rows = part["majority"]
    best, other = sorted("ab", key=lambda choice: -rows[choice]["captions"])
    row, others = rows[best], [other, *(name for name in rows if name not in ("a", "b"))]
    rest = [f"{CHOICES[each]} on {rows[each]['captions']}" for each in others]
    return (
        f"{TITLES[name]}: {CHOICES[best]} has the majority on {row['captions']} of "
        f"{part['captions']} captions, {percent(row['share'])} (95% interval "
        f"{percent(row['low'])} to {percent(row['high'])}), {', '.join(rest)}."
    )


def percent(value: float | None) -> str:
    """A share as text."""
    return "–" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def templates() -> jinja2.Environment:
    """The pages' templates: escaped, and an unknown name is an error."""
    loader = jinja2.FileSystemLoader(PAGES)
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    pages.filters.update(percent=percent, number=_number)
    return pages


def _page(folder: Path, study: Study, body: Json) -> str:
    pairs: list[dict[str, Any]] = [
        {
            "row": row,
            "a": _picture(picture_file(folder, trial, "a")),
            "b": _picture(picture_file(folder, trial, "b")),
        }
        for trial, row in enumerate(body["by_caption"][:SHOWN])
    ]
    return (
        templates()
        .get_template(PAGE)
        .render(
            body={"all_raters": None, **body},
            findings=findings(body),
            titles=TITLES,
            choices=CHOICES,
            pairs=pairs,
            hidden=len(study.captions) - len(pairs),
        )
    )


def _picture(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; restore the folder {PICTURES}"
        ) from error
    small = encode_png(decoded(Encoded(data, str(path)), _SIDE))
    return "data:image/png;base64," + base64.b64encode(small).decode()
