"""SQL over a catalogue by DuckDB: out of core, on local files, without a network.

The view `pairs` has one row a pair: the columns of schema.py, and

    caption                      the first caption
    kept                         true for the pairs that training reads
    reject, reason               why a pair is left out, by its unit or by the whole set
    first_unit, first_place      the earlier pair that a duplicate is like
"""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from data_pipeline.catalogue.parts import Catalogue
from data_pipeline.config import CatalogueConfig

_TOGETHER, _BATCH = 10_000, 2**20
_PAIRS = """
CREATE VIEW pairs AS
SELECT parts.* EXCLUDE (reject, reason), captions[1] AS caption,
    split IS NOT NULL AND coalesce(parts.reject, left_out.reject) IS NULL AS kept,
    coalesce(parts.reject, left_out.reject) AS reject,
    coalesce(parts.reason, left_out.reason) AS reason,
    first_unit, first_place
FROM parts LEFT JOIN left_out ON parts.unit = left_out.unit AND parts.place = left_out.place
"""
_PAIRS_ALL_IN = """
CREATE VIEW pairs AS
SELECT parts.*, captions[1] AS caption, split IS NOT NULL AND reject IS NULL AS kept,
    NULL::UINTEGER AS first_unit, NULL::UINTEGER AS first_place
FROM parts
"""


@contextmanager
def open_database(catalogue: Catalogue, config: CatalogueConfig) -> Iterator["Database"]:
    """Open a catalogue's files for SQL; spills to TMPDIR above the memory limit.

    DuckDB may read these files and its temporary folder, and nothing else: extensions are neither
    installed nor loaded, and no query can change that.
    """
    paths = [*map(str, catalogue.paths), *([str(catalogue.left_out)] if catalogue.left_out else [])]
    with TemporaryDirectory(prefix="tapir-duckdb-") as folder:
        settings: dict[str, Any] = {
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "memory_limit": f"{config.memory_gigabytes:g}GB",
            "threads": config.threads,
            "temp_directory": folder,
        }
        with duckdb.connect(":memory:", config=settings) as connection:
            connection.execute("SET allowed_paths = $1", [paths])
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            connection.from_parquet(list(map(str, catalogue.paths))).create_view("parts")
            if catalogue.left_out:
                connection.from_parquet(str(catalogue.left_out)).create_view("left_out")
            connection.execute(_PAIRS if catalogue.left_out else _PAIRS_ALL_IN)
            yield Database(connection)


class Database:
    """A catalogue that answers SQL."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of one of our own queries."""
        with _wrong_sql(sql):
            return self._connection.execute(sql).fetchall()

    def ask(self, sql: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """Column names and rows of a user's query.

        Raises: InputError if it is not one SELECT, is wrong, or needs more memory or disk.
        """
        self._refuse_others(sql)
        with _wrong_sql(sql):
            columns: Any = self._connection.execute(sql).description
        return [column[0] for column in columns], self._fetched(sql)

    def chosen(self, where: str) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
        """(units, places) of the kept pairs for which a condition holds, in no order.

        Raises: InputError as `ask` does.
        """
        self._refuse_others(f"SELECT * FROM pairs WHERE {where}")
        sql = f"SELECT unit, place FROM pairs WHERE kept AND ({where}\n)"
        with _wrong_sql(where):
            batches: Any = self._connection.sql(sql).to_arrow_reader(_BATCH)
            for batch in batches:
                yield batch["unit"].to_numpy(), batch["place"].to_numpy()

    def _fetched(self, sql: str) -> Iterator[tuple[Any, ...]]:
        while True:
            with _wrong_sql(sql):
                rows = self._connection.fetchmany(_TOGETHER)
            if not rows:
                return
            yield from rows

    def _refuse_others(self, sql: str) -> None:
        with _wrong_sql(sql):
            kinds = [statement.type for statement in self._connection.extract_statements(sql)]
        if kinds != [duckdb.StatementType.SELECT]:
            raise InputError(f"{sql!r} is not one SELECT; other statements are not answered")


@contextmanager
def _wrong_sql(sql: str) -> Iterator[None]:
    """DuckDB's errors as ours."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"the query {sql!r} needs more memory or disk than it may use: {error}; raise "
            "--memory-gigabytes, or set TMPDIR to a larger disk"
        ) from error
    except duckdb.Error as error:
        raise InputError(
            f'the query {sql!r} failed: {error}; `tapir data SET --sql "DESCRIBE pairs"` lists '
            "the columns"
        ) from error
