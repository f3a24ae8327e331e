"""leaderboard.md: the suites that were measured below a folder, one table for each set of prompts.

Rows of a table have the same prompts and judges; settings and models may differ, and are shown.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CorruptError
from core.files.atomic import Json, canonical_json, sha256, write_atomic
from core.log import LOG
from generation.evaluation.suites.record import FILE, GALLERY
from generation.evaluation.suites.registry import SUITES
from workflow.report.plots import candidate_curves

LEADERBOARD, CURVE = "leaderboard.md", "curve.svg"
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")
"""Where a suite's folder may be; data sets are not searched to their ends."""
_READ: dict[str, type] = {
    **{"suite": str, "facts": dict, "prompts": list, "settings": dict, "models": dict},
    **{"headline": list, "results": dict},
}
"""Keys of a suite.json that the tables read, and their types."""
_FACT = 24
"""Characters of a fact in a heading: some are digests."""
_MEND = "delete it, and measure again by `tapir evaluate --suite NAME`"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The measurements of one suite on the same prompts."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    curves: dict[str, str]
    """Row -> its curve against the number of candidates, as SVG."""


def suite_tables(folder: Path) -> list[Table]:
    """The tables of all suite.json below a folder, best rows first.

    Raises: CorruptError for a damaged one.
    """
    groups: dict[str, list[tuple[str, Json]]] = {}
    for path in sorted({p for depth in _DEPTHS for p in folder.glob(f"{depth}{FILE}")}):
        body = _read(path)
        if body is not None:
            asked = {key: body[key] for key in ("suite", "facts", "prompts")}
            name = path.parent.relative_to(folder).as_posix()
            groups.setdefault(sha256(canonical_json(asked)), []).append((name, body))
    firsts = [rows[0][1] for rows in groups.values()]
    tables = [
        _table(f"{_heading(rows[0][1], firsts)} ({digest[:8]})", folder, rows)
        for digest, rows in groups.items()
    ]
    return sorted(tables, key=lambda table: table.title)


def _heading(body: Json, firsts: list[Json]) -> str:
    """A table's suite, number of prompts, and facts in which tables of the suite differ."""
    same = [each["facts"] for each in firsts if each["suite"] == body["suite"]]
    facts = [(name, body["facts"].get(name)) for name in sorted(_differing(same))]
    texts = [f", {name} {_shown(value)[:_FACT]}" for name, value in facts if value is not None]
    return f"{body['suite']}: {len(body['prompts'])} prompts{''.join(texts)}"


def write_leaderboard(folder: Path, tables: list[Table]) -> Path:
    """Write leaderboard.md, and beside each suite.json with a curve its curve.svg."""
    parts = [
        "# Leaderboard\n\nWritten by `tapir report`; each row is a suite.json, which "
        "`tapir evaluate --suite PATH` measures again.\n"
    ]
    for table in tables:
        lines = [_line(table.columns), _line(["---"] * len(table.columns))]
        lines += [_line(row) for row in table.rows]
        parts.append(f"\n## {table.title}\n\n" + "\n".join(lines) + "\n")
        for name, svg in table.curves.items():
            path = (Path(name) / CURVE).as_posix()
            write_atomic(folder / path, svg.encode())
            parts.append(f"\n![{name}]({path})\n")
    for gallery in galleries(folder, tables):
        parts.append(f"\n## {gallery['title']}: {gallery['folder']}\n\n{gallery['text']}\n")
        parts += [f"\n{row['caption']}\n\n![]({row['path']})\n" for row in gallery["rows"]]
    target = folder / LEADERBOARD
    write_atomic(target, "".join(parts).encode())
    return target


def galleries(folder: Path, tables: list[Table]) -> list[Json]:
    """The pictures that the suites of the tables wrote: folder, title, text, rows (caption, path).

    Paths are relative to `folder`. Raises: CorruptError for a damaged index or a missing picture.
    """
    shown = []
    for name in [row[0] for table in tables for row in table.rows]:
        path = folder / name / GALLERY
        if not path.is_file():
            continue
        try:
            body = json.loads(path.read_bytes())
            rows = [
                {"caption": str(row["caption"]), "path": (Path(name) / row["file"]).as_posix()}
                for row in body["rows"]
            ]
            shown.append({"folder": name, "title": body["title"], "text": body["text"]})
            shown[-1]["rows"] = rows
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptError(f"{path} is damaged: {error!r}; {_MEND}") from error
        for row in rows:
            if not (folder / row["path"]).is_file():
                raise CorruptError(f"{path} names {row['path']}, which is missing; {_MEND}")
    return shown


def _read(path: Path) -> Json | None:
    """A suite.json with figures; None for one without: written by hand, or not measured yet.

    Raises: CorruptError if it is damaged.
    """
    try:
        body: Json = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{path} is damaged: {error}; {_MEND}") from error
    if isinstance(body, dict) and not {"headline", "results"} & body.keys():
        LOG.warning("%s holds no figures of a suite, and is left out", path)
        return None
    if wrong := _wrong_keys(body):
        raise CorruptError(f"{path} is damaged: {', '.join(wrong)} missing or wrong; {_MEND}")
    return body


def _wrong_keys(body: Any) -> list[str]:
    """Keys of a suite.json that the tables read, and that are missing or of another type."""
    if not isinstance(body, dict):
        return list(_READ)
    wrong = [name for name, kind in _READ.items() if not isinstance(body.get(name), kind)]
    if "headline" in wrong:
        return wrong
    whole = body["headline"] and all(
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("value"), int | float)
        for each in body["headline"]
    )
    return wrong if whole else [*wrong, "headline"]


def _curve(path: Path, results: Json) -> str:
    try:
        return candidate_curves(results)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptError(f"{path} is damaged: results: {error!r}; {_MEND}") from error


def _table(title: str, folder: Path, rows: list[tuple[str, Json]]) -> Table:
    """A table of measurements with the same prompts, ordered by the first figure."""
    suite = rows[0][1]["suite"]
    known = SUITES.get(suite)
    sign = 1 if known is not None and known.lower_is_better else -1
    rows = sorted(rows, key=lambda row: (sign * row[1]["headline"][0]["value"], row[0]))
    figures = list(dict.fromkeys(each["name"] for _, body in rows for each in body["headline"]))
    settings = _differing([body["settings"] for _, body in rows])
    models = ["prior", *(m for m in _differing([b["models"] for _, b in rows]) if m != "prior")]
    cells = []
    for name, body in rows:
        values = {each["name"]: f"{each['value']:.4g}" for each in body["headline"]}
        cells.append(
            [
                name,
                *(values.get(figure, "") for figure in figures),
                *(_shown(body["settings"].get(setting)) for setting in settings),
                *(str(body["models"].get(model, ""))[:8] for model in models),
            ]
        )
    return Table(
        title=title,
        columns=["folder", *figures, *settings, *models],
        rows=cells,
        curves={
            name: _curve(folder / name / FILE, body["results"])
            for name, body in rows
            if body["suite"] == "best-of-n"
        },
    )


def _differing(values: list[Json]) -> list[str]:
    """Keys whose values are not the same in all."""
    keys = dict.fromkeys(key for each in values for key in each)
    return [key for key in keys if any(each.get(key) != values[0].get(key) for each in values)]


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
