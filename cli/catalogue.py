"""The verb data."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

from cli.data import join
from core.config import check
from core.files.atomic import refuse_folder
from core.files.out_folder import refuse_others_folder
from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from core.storage.store import Store, open_store
from data_pipeline.catalogue.keep import keep as keep_pairs
from data_pipeline.catalogue.page import write_page
from data_pipeline.catalogue.parts import Catalogue, open_catalogue
from data_pipeline.catalogue.query import Database, open_database
from data_pipeline.catalogue.summary import summarise
from data_pipeline.config import CatalogueConfig, FilterConfig


def data(arguments: list[str]) -> None:
    """`tapir data SET`, `tapir data join`."""
    if arguments[:1] == ["join"]:
        join(arguments[1:])
    else:
        _data(arguments)


def _data(arguments: list[str]) -> None:
    """`tapir data SET`."""

    def run(
        data: PositionalText,
        sql: str = "",
        keep: str = "",
        dest: str = "",
        duplicates: bool = False,
        near: int = -1,
        out: Path = Path("runs/data.html"),
        config: Annotated[CatalogueConfig, FLAT] = CatalogueConfig(),  # noqa: B008
        json: bool = False,
    ) -> None:
        """Count the pairs of a raw set and write a page about it; answer SQL; write keep-lists.

        All of it is read from the set's catalogue; only the page reads a few blocks of pictures.
        `tapir data join A B --dest C` makes one set of several.

        Args:
            data: the data set that `tapir pack` wrote
            sql: a SELECT on `pairs`, answered as tab-separated text, e.g. "SELECT language,
                count(*) FROM pairs WHERE kept GROUP BY 1"; "DESCRIBE pairs" lists the columns
            keep: a condition on `pairs`, e.g. "words >= 3 AND width <= 2 * height"; --dest gets a
                set of the kept pairs for which it holds, without a copy of the pictures
            dest: s3://bucket/prefix or a folder for the set of --keep
            duplicates: with --keep, leave out exact duplicates among the chosen pairs
            near: with --keep, leave out near duplicates among them: at most so many of 128 bits of
                the perceptual hash differ (0 to 3)
            out: the page
            config: settings
            json: print a JSON object on the last line
        """
        filters = FilterConfig(duplicates=duplicates, near=near)
        check([*config.problems(), *filters.problems(), *_problems(sql, keep, dest, filters)])
        if dest:
            refuse_others_folder(dest, "a data set")
        store = open_store(data)
        catalogue = open_catalogue(store, config.cache)
        with open_database(catalogue, config) as database:
            if sql:
                _answer(database, sql, json)
            elif keep:
                _keep(store, open_store(dest), catalogue, database, keep, filters, json)
            else:
                _report(store, database, out, json)

    parse(run, arguments, "data")


def _problems(sql: str, keep: str, dest: str, filters: FilterConfig) -> list[str]:
    problems = []
    if sql and keep:
        problems.append("--sql and --keep cannot be combined; give one of them")
    if bool(keep) != bool(dest):
        problems.append("--keep needs --dest, the place of its set, and --dest needs --keep")
    if not keep and (filters.duplicates or filters.near >= 0):
        problems.append('--duplicates and --near belong to --keep; all pairs: --keep "true"')
    return problems


def _answer(database: Database, sql: str, json: bool) -> None:
    """Print the rows of a query."""
    names, rows = database.ask(sql)
    if json:
        print_json({"columns": names, "rows": [[_as_json(cell) for cell in row] for row in rows]})
        return
    sys.stdout.write("\t".join(map(_as_text, names)) + "\n")
    for row in rows:
        sys.stdout.write("\t".join(map(_as_text, row)) + "\n")


def _as_json(cell: Any) -> Any:
    if isinstance(cell, list | tuple):
        return [_as_json(item) for item in cell]
    if isinstance(cell, dict):
        return {str(name): _as_json(item) for name, item in cell.items()}
    if isinstance(cell, bytes):
        return cell.hex()
    if isinstance(cell, float) and not math.isfinite(cell):
        return str(cell)  # JSON has no such numbers
    return cell if isinstance(cell, str | int | float | bool | None) else str(cell)


def _as_text(cell: Any) -> str:
    """A cell in one line that cannot command a terminal."""
    text = "" if cell is None else str(_as_json(cell))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _keep(
    store: Store,
    dest: Store,
    catalogue: Catalogue,
    database: Database,
    where: str,
    filters: FilterConfig,
    json: bool,
) -> None:
    views = keep_pairs(store, dest, catalogue, database, where, filters)
    for split, view in views.items():
        LOG.info("%s: %d pairs", split, view.samples)
    if json:
        counts = {split: view.samples for split, view in views.items()}
        print_json({**counts, "rejects": views["train"].rejects})


def _report(store: Store, database: Database, out: Path, json: bool) -> None:
    """Log the counts of a set and write its page."""
    refuse_folder(out)
    summary = summarise(database)
    kept = ", ".join(f"{split} {count:,}" for split, count in summary.kept.items())
    LOG.info("%s: %d pairs (%s)", store.url, sum(summary.kept.values()), kept)
    if summary.rejects:
        rows = ", ".join(f"{count:,} {kind}" for kind, count in summary.rejects.items())
        LOG.info("left out: %s", rows)
    for title, counts in summary.histograms.items():
        LOG.info("%s: %s", title, "; ".join(f"{label}: {n:,}" for label, n in counts.items()))
    write_page(store, summary, out)
    LOG.info("page: %s", out)
    if json:
        print_json(summary)
