"""The object store on a real S3 server (SeaweedFS)."""

import hashlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.support.proxy import faulty_proxy
from checkpoint.reader import CheckpointReader
from cluster.object_server import ObjectServer
from core.errors import AbsentError, InputError, StoreError, StoreInputError
from core.storage.s3 import S3Store
from core.storage.store import FolderStore, Store
from data_pipeline.config import PackConfig
from data_pipeline.packing.pack import pack
from tests.harness import tapir


@pytest.fixture(params=["folder", "s3"])
def store(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path)
    s3: ObjectServer = request.getfixturevalue("s3")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    made = S3Store(f"b{uuid.uuid4().hex[:12]}", "some/prefix")
    made.make_bucket()
    return made


def test_objects_ranges_and_names(store: Store) -> None:
    store.put("a/x", b"0123456789")
    store.put("a/y", b"")
    store.put("b", b"b")
    assert store.get("a/x") == b"0123456789"
    assert store.get("a/x", 3, 4) == b"3456"
    assert store.get("a/x", 8) == b"89"
    assert store.names("a/") == ["a/x", "a/y"]
    assert store.exists("b") and not store.exists("c")
    size, etag = store.head("b")
    assert size == 1 and etag in ("", hashlib.md5(b"b").hexdigest())
    with pytest.raises(StoreInputError, match="there is no c"):
        store.get("c")


def test_the_first_put_wins(store: Store) -> None:
    assert store.put("x", b"first", if_absent=True)
    assert not store.put("x", b"second", if_absent=True)
    assert store.get("x") == b"first"


@pytest.mark.seconds
def test_wrong_bucket_and_wrong_key_exit_2_without_secrets(s3: ObjectServer) -> None:
    flags = ["train", "bpe", "tiny", "--data=s3://no-such-bucket/raw"]
    text = tapir(*flags, code=2, **s3.environment)
    assert "no bucket 'no-such-bucket'" in text
    wrong = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrongsecretvalue"}
    text = tapir(*flags, code=2, **wrong)
    assert "check AWS_ACCESS_KEY_ID" in text
    assert "wrongsecretvalue" not in text


@pytest.mark.seconds
@pytest.mark.parametrize("outage", [(1, 2), (2, 3)])
def test_an_outage_at_the_start_of_a_job_is_waited_out(
    s3: ObjectServer, monkeypatch: pytest.MonkeyPatch, outage: tuple[int, ...]
) -> None:
    """A job's first requests: HEAD of an object that does not exist yet, then of its bucket."""
    bucket = f"b{uuid.uuid4().hex[:12]}"
    asked: list[str] = []

    def plan(number: int, method: str, path: str) -> str:
        asked.append(path)
        return "reset" if number in outage else ""

    with s3.credentials():
        S3Store(bucket, "").make_bucket()
    with faulty_proxy(s3.endpoint, plan) as address:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        assert not S3Store(bucket, "", attempts=1).exists("x")
    assert len(asked) == 4 and asked[0] == f"/{bucket}/x" and asked[3] == f"/{bucket}"


@pytest.fixture
def beside(s3: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A bucket behind a proxy that gives the chosen answer to every request; yields its name."""
    bucket, answer = f"b{uuid.uuid4().hex[:12]}", [""]

    def tell(what: str) -> str:
        answer[0] = what
        return bucket

    with s3.credentials():
        S3Store(bucket, "").make_bucket()
    with faulty_proxy(s3.endpoint, lambda *_: answer[0]) as address:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        yield tell


def test_a_refused_request_does_not_mean_absent(beside: Callable[[str], str]) -> None:
    """Absent or damaged objects are made anew; a refused key must not cause that."""
    store = S3Store(beside("403"), "", attempts=1, patience=0)
    for ask in (lambda: store.get("x"), lambda: CheckpointReader(store, "step-4")):
        with pytest.raises(StoreInputError, match="access denied") as raised:
            ask()
        assert not isinstance(raised.value, AbsentError)
    beside("404")  # a proxy's: the store names what is missing
    with pytest.raises(StoreError, match="404") as raised:
        store.get("x")
    assert not isinstance(raised.value, AbsentError)
    beside("")
    with pytest.raises(AbsentError):
        store.get("x")


@pytest.mark.parametrize(
    "answer,text,code",
    [
        ("503", "503", 1),
        ("301", "elsewhere", 2),
        ("reset", "not answered yet.*AWS_ENDPOINT", 1),
    ],
)
def test_no_answer_does_not_mean_absent(
    beside: Callable[[str], str], answer: str, text: str, code: int
) -> None:
    store = S3Store(beside(answer), "", attempts=1, patience=0)
    with pytest.raises(StoreError, match=text) as raised:
        store.exists("x")
    assert raised.value.exit_code == code
    with pytest.raises(StoreError, match=text.partition(".")[0]):
        store._check_bucket()


def test_a_store_that_went_away_is_no_wrong_input(
    s3: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)

    def plan(number: int, method: str, path: str) -> str:
        return "reset" if number > 2 else ""

    with faulty_proxy(s3.endpoint, plan) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        store, late = (S3Store("tapir-tests", "", attempts=1, patience=0) for _ in range(2))
        assert not store.exists("x")
        with pytest.raises(StoreError):  # the kept-alive connection ends, too
            store.exists("x")
    for one, code in ((store, 1), (late, 2)):
        with pytest.raises(StoreError) as raised:
            one.exists("x")
        assert raised.value.exit_code == code


@pytest.mark.seconds
def test_a_silent_port_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.storage.s3_clients._FIRST_SECONDS", 0.5)
    monkeypatch.setattr("core.storage.s3_retry.FIRST_PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"not answered yet: check .*AWS_ENDPOINT_URL"):
            S3Store("bucket", "").exists("x")
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "name,value,text",
    [
        ("AWS_ACCESS_KEY_ID", "hidden\n", "white space"),
        ("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:1", "holds a user"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1/?x=hidden", "or query"),
        ("AWS_ENDPOINT_URL", "http://[broken", "http://host:port"),
        ("AWS_PROFILE", "nosuch", "nosuch"),
        ("AWS_DEFAULT_REGION", "us east", "as us-east-1"),
    ],
)
def test_wrong_environments_say_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreInputError, match=text) as raised:
        S3Store("bucket", "")
    assert "hidden" not in str(raised.value)


def test_an_endpoint_of_a_config_file_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://user:hidden@127.0.0.1:1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StoreInputError, match="holds a user") as raised:
        S3Store("bucket", "")
    assert "hidden" not in str(raised.value)


def test_a_folder_is_listed_while_others_delete_from_it(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("step-0/kept", b"")

    def rewrite() -> None:
        for i in range(1, 400):
            store.put(f"step-{i}/a", b"")
            store.delete(f"step-{i}/a")

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(rewrite)
        listed = [store.names("step-")]
        while not writing.done():
            listed.append(store.names("step-"))
        writing.result()
    assert len(listed) > 10 and all("step-0/kept" in names for names in listed)
    assert store.names("step-") == ["step-0/kept"]
    with pytest.raises(StoreError, match="cannot list"):  # unlike a folder that is not there
        store.names("x" * 300 + "/")


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)

    def work(worker: int) -> int:
        won = 0
        for i in range(100):
            body = f"{worker} {i}".encode()
            if store.put(f"leases/{i}", body, if_absent=True):
                assert store.get(f"leases/{i}") == body
                won += 1
            store.put(f"leases/mine-{worker}", body)
            store.delete(f"leases/mine-{worker}")
        return won

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == 100
    assert len(store.names()) == 100


def test_a_finished_pack_is_reused_in_every_store(store: Store, tmp_path: Path) -> None:
    config = PackConfig(count=30, validation=0.3)
    manifests = pack("shapes", store, config)
    assert pack("shapes", store, config) == manifests
    with pytest.raises(InputError, match="is taken by another data set"):
        pack("shapes", store, PackConfig(count=31, validation=0.3))
