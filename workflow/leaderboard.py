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
from workflow.plots import candidate_curves

LEADERBOARD, CURVE = "leaderboard.md", "curve.svg"
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")
"""Where a suite's folder may be; data sets are not searched to their ends."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The measurements of one suite on the same prompts."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    curves: dict[str, str]
    """Row -> its curve against the number of candidates, as SVG."""


def suite_tables(folder: Path) -> list[Table]:
    """The tables of all suite.json below a folder, best rows first."""
    groups: dict[str, list[tuple[str, Json]]] = {}
    for path in sorted({p for depth in _DEPTHS for p in folder.glob(f"{depth}{FILE}")}):
        body = _read(path)
        if body is not None:
            asked = {key: body[key] for key in ("suite", "facts", "prompts")}
            name = path.parent.relative_to(folder).as_posix()
            groups.setdefault(sha256(canonical_json(asked)), []).append((name, body))
    tables = [_table(rows) for rows in groups.values()]
    return sorted(tables, key=lambda table: table.title)


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

    Paths are relative to `folder`. Raises: CorruptError for a damaged index.
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
            raise CorruptError(f"{path} is damaged: {error!r}; delete it") from error
    return shown


def _read(path: Path) -> Json | None:
    """A suite.json with figures; None for one that was written by hand, or is damaged."""
    try:
        body: Json = json.loads(path.read_bytes())
        asked = ("suite", "facts", "prompts", "settings", "models", "headline", "results")
        if all(key in body for key in asked):
            return body
    except (ValueError, TypeError):
        pass
    LOG.warning("%s holds no figures of a suite, and is left out", path)
    return None


def _table(rows: list[tuple[str, Json]]) -> Table:
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
    first = rows[0][1]
    digest = sha256(canonical_json({"prompts": first["prompts"]}))[:8]
    return Table(
        title=f"{suite}: {len(first['prompts'])} prompts ({digest})",
        columns=["folder", *figures, *settings, *models],
        rows=cells,
        curves={
            name: candidate_curves(body["results"])
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
