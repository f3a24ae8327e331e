"""SQL over a catalogue and keep-lists, without a network."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.support.counted import CountedStore
from cluster.object_server import ObjectServer
from core.errors import CorruptError, InputError
from core.storage.store import FolderStore, open_store
from data_pipeline.catalogue.keep import keep
from data_pipeline.catalogue.parts import open_catalogue
from data_pipeline.catalogue.query import Database, open_database
from data_pipeline.config import CatalogueConfig, FilterConfig
from data_pipeline.formats.manifest import Manifest
from tests.catalogued import Made, catalogued_set, small_set
from tests.in_place import records_of
from workflow.verify import verify_path

CONFIG = CatalogueConfig(memory_gigabytes=0.5)
REPEATED = {f"k{number:03d}" for number in range(9, 80, 10)}
"""Pairs of the small set that repeat the pair before them, or its picture."""
UNUSABLE = {"x", "y"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python opens no socket; what DuckDB may open is tested in a namespace without a network."""

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture
def made(tmp_path: Path) -> tuple[FolderStore, list[Made]]:
    return small_set(tmp_path)


@pytest.fixture
def database(made: tuple[FolderStore, list[Made]], tmp_path: Path) -> Iterator[Database]:
    with open_database(open_catalogue(made[0], tmp_path / "cache"), CONFIG) as database:
        yield database


@pytest.mark.usefixtures("no_network")
def test_rows_of_the_set_are_answered(
    made: tuple[FolderStore, list[Made]], database: Database, tmp_path: Path
) -> None:
    names, answer = database.ask("SELECT reject, count(*) n FROM pairs GROUP BY 1 ORDER BY 1")
    assert names == ["reject", "n"]
    expected = [("duplicate", 4), ("file", 1), ("near-duplicate", 4), ("small", 1), (None, 72)]
    assert list(answer) == expected
    kept = database.ask("SELECT key, caption FROM pairs WHERE kept ORDER BY unit, place")[1]
    left = REPEATED | UNUSABLE
    assert list(kept) == [(row.key, row.caption) for row in made[1] if row.key not in left]
    firsts = "SELECT key, reason, first_unit, first_place FROM pairs WHERE key = 'k019'"
    assert list(database.ask(firsts)[1]) == [("k019", "the same pair as k018", 0, 19)]
    assert list(database.ask("SHOW TABLES")[1]) == [("left_out",), ("pairs",), ("parts",)]
    assert not (tmp_path / "cache").exists(), "a folder's files were copied"


@pytest.mark.parametrize(
    "sql",
    [
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "COPY pairs TO '{folder}/out.csv'",
        "ATTACH '{folder}/other.db'",
        "SELECT 1; SELECT 2",
        "DROP VIEW pairs",
        "SELECT * FROM 'https://localhost/a.parquet'",
        "SELECT * FROM 's3://bucket/a.parquet'",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_csv('{folder}/set/train/manifest.json')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT nothing FROM pairs",
        "SELEC",
        "",
    ],
)
def test_other_statements_and_files_are_refused(
    sql: str, database: Database, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"failed|not one SELECT"):
        list(database.ask(sql.format(folder=tmp_path))[1])
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".csv", ".db")]
    assert list(database.ask("SELECT count(*) FROM pairs")[1]) == [(82,)], "it still answers"


@pytest.mark.seconds
def test_a_query_needs_no_network(made: tuple[FolderStore, list[Made]], tmp_path: Path) -> None:
    """In a network namespace that has not even a loopback interface."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"]).returncode:
        pytest.skip("needs unshare and user namespaces")
    code = "import tapir; tapir.main()"
    query = ["data", made[0].url, "--sql", "SELECT count(*) FROM pairs WHERE kept"]
    command = ["unshare", "-rn", sys.executable, "-c", code, *query]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert run.stdout.splitlines() == ["count_star()", "72"], run.stderr


def _kept(
    made: tuple[FolderStore, list[Made]],
    database: Database,
    dest: Path,
    where: str = "true",
    filters: FilterConfig = FilterConfig(),  # noqa: B008 - frozen
) -> dict[str, Manifest]:
    catalogue = open_catalogue(made[0], dest.parent / "cache")
    return keep(made[0], FolderStore(dest), catalogue, database, where, filters)


def test_a_view_has_the_chosen_pairs_and_reads_no_picture(
    made: tuple[FolderStore, list[Made]], database: Database, tmp_path: Path
) -> None:
    dest, away = tmp_path / "view", tmp_path / "away"
    tars = sorted((tmp_path / "set").rglob("*.tar"))
    away.mkdir()
    for number, tar in enumerate(tars):
        tar.rename(away / str(number))
    where = "split = 'validation' OR width % 2 = 0 -- a comment"
    views = _kept(made, database, dest, where)
    for number, tar in enumerate(tars):
        (away / str(number)).rename(tar)
    expected = {
        row.key: row
        for row in made[1]
        if row.key not in REPEATED | UNUSABLE
        and (row.split == "validation" or (24 + row.picture % 5) % 2 == 0)
    }
    records = {record.key: record for record in records_of(FolderStore(dest))}
    assert records.keys() == expected.keys() and len(records) < 72
    assert all(records[key].caption == row.caption for key, row in expected.items())
    assert sum(view.samples for view in views.values()) == len(expected)
    assert views["train"].rejects["condition"] == 72 - len(expected)
    assert not list(dest.rglob("*.tar"))
    assert _kept(made, database, dest, where) == views, "a finished view is kept"
    with pytest.raises(InputError, match="another data set"):
        _kept(made, database, dest, "true")


def test_a_view_of_a_view_has_a_catalogue_too(
    made: tuple[FolderStore, list[Made]], database: Database, tmp_path: Path
) -> None:
    _kept(made, database, tmp_path / "even", "width % 2 = 0")
    view = FolderStore(tmp_path / "even")
    catalogue = open_catalogue(view, tmp_path / "cache")
    with open_database(catalogue, CONFIG) as second:
        ask = "SELECT key FROM pairs WHERE kept ORDER BY key"
        names = [row[0] for row in second.ask(ask)[1]]
        assert names == [record.key for record in records_of(view)]
        reason = "SELECT DISTINCT reason FROM pairs WHERE reject = 'condition'"
        assert list(second.ask(reason)[1]) == [("not width % 2 = 0",)]
        dest = FolderStore(tmp_path / "both")
        keep(view, dest, catalogue, second, "height < 100 AND key > 'k04'", FilterConfig())
    assert [record.key for record in records_of(dest)] == [name for name in names if name > "k04"]


def test_near_duplicates_are_judged_among_the_chosen_pairs(tmp_path: Path) -> None:
    """Without k018 its repetition k019 stays; the set was packed without looking for any."""
    store, rows = small_set(tmp_path, filters=FilterConfig())
    with open_database(open_catalogue(store, tmp_path / "cache"), CONFIG) as database:
        filters = FilterConfig(near=0)
        _kept((store, rows), database, tmp_path / "view", "key <> 'k018'", filters)
    keys = {record.key for record in records_of(FolderStore(tmp_path / "view"))}
    dropped = (REPEATED - {"k019"}) | {"k018"} | UNUSABLE
    assert keys == {row.key for row in rows} - dropped


@pytest.mark.parametrize("where", ["true) OR (true", "nothing > 1", "", "1; DROP VIEW pairs"])
def test_a_wrong_condition_is_refused(
    where: str, made: tuple[FolderStore, list[Made]], database: Database, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"failed|not one SELECT"):
        _kept(made, database, tmp_path / "view", where)
    with pytest.raises(InputError, match="no pair of validation is left"):
        _kept(made, database, tmp_path / "view", "split = 'train'")
    assert not (tmp_path / "view").exists()
    with pytest.raises(InputError, match="choose an empty DEST"):
        _kept(made, database, tmp_path / "set-work", "true")


@pytest.mark.seconds
def test_a_catalogue_in_a_store_is_copied_once_and_checked(
    s3: ObjectServer, tmp_path: Path
) -> None:
    _, rows = small_set(tmp_path)
    cache, work = tmp_path / "cache", tmp_path / "work"
    work.mkdir()
    with s3.credentials():
        store = CountedStore(open_store("s3://tapir-tests/catalogued"))
        catalogued_set(store, work, [rows[:40], rows[40:]])
        for expected in (5, 2):  # the manifest, the list, two units, what the set leaves out
            store.requests.clear()
            catalogue = open_catalogue(store, cache)
            assert store.requests["GET"] == expected
        assert verify_path("s3://tapir-tests/catalogued")[-1].endswith("catalogue: 3 files")
        damaged = catalogue.paths[1]
        damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
        with open_database(open_catalogue(store, cache), CONFIG) as database:
            assert list(database.ask("SELECT count(*) FROM pairs WHERE kept")[1]) == [(72,)]
            dest = open_store("s3://tapir-tests/catalogued-view")
            keep(store, dest, catalogue, database, "width <= 26", FilterConfig())
        narrow = {row.key for row in rows if row.picture % 5 <= 2} - REPEATED - UNUSABLE
        assert {record.key for record in records_of(dest)} == narrow
        assert open_catalogue(dest, cache).paths == catalogue.paths


def test_changed_files_are_reported(made: tuple[FolderStore, list[Made]], tmp_path: Path) -> None:
    store = made[0]
    for path in sorted(store.root.joinpath("catalogue").iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CorruptError, match=path.name):
            open_catalogue(store, tmp_path / "cache")
        with pytest.raises(CorruptError, match=path.name):
            verify_path(store.url)
        path.write_bytes(data)
    open_catalogue(store, tmp_path / "cache")
    assert verify_path(store.url)[-1] == f"{store.url}/catalogue: 4 files"
    assert len(verify_path(store.url, 0.5)) == 2, "a sample is of the blocks"
