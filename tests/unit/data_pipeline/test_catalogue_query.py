"""SQL over a catalogue, keep-lists, and the page: without a network."""

import socket
from pathlib import Path

import pytest

from core.errors import CorruptError, InputError
from data_pipeline.catalogue.parts import open_catalogue
from data_pipeline.catalogue.query import Database, open_database
from data_pipeline.config import CatalogueConfig
from tests.catalogued import small_set

CONFIG = CatalogueConfig(memory_gigabytes=0.5)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every socket of this process fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.usefixtures("no_network")
def test_rows_of_the_set_are_answered(tmp_path: Path) -> None:
    store, rows = small_set(tmp_path)
    with open_database(open_catalogue(store, tmp_path / "cache"), CONFIG) as database:
        names, answer = database.ask("SELECT reject, count(*) n FROM pairs GROUP BY 1 ORDER BY 1")
        assert names == ["reject", "n"]
        assert list(answer) == [
            ("duplicate", 4),
            ("file", 1),
            ("near-duplicate", 4),
            ("small", 1),
            (None, 72),
        ]
        kept = database.ask("SELECT key, caption FROM pairs WHERE kept ORDER BY unit, place")[1]
        left = {row.key for row in rows[:0]} | {f"k{n:03d}" for n in range(9, 80, 10)} | {"x", "y"}
        expected = [(row.key, row.caption) for row in rows if row.key not in left]
        assert list(kept) == expected
        firsts = "SELECT key, reason, first_unit, first_place FROM pairs WHERE key = 'k019'"
        assert list(database.ask(firsts)[1]) == [("k019", "the same pair as k018", 0, 19)]
    assert not (tmp_path / "cache").exists(), "a folder's files were copied"
