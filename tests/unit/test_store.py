"""The object store on a real S3 server (SeaweedFS)."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.proxy import faulty_proxy
from cluster.object_server import ObjectServer
from core.errors import InputError, StoreInputError
from core.s3 import S3Store
from core.store import FolderStore, Store
from data_pipeline.config import PackConfig
from data_pipeline.pack import pack
from tests.harness import tapir


@pytest.fixture(params=["folder", "s3"])
def store(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    s3: ObjectServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path)
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
    assert len(store.etag("b")) == 32
    with pytest.raises(StoreInputError, match="there is no c"):
        store.get("c")


def test_the_first_put_wins(store: Store) -> None:
    assert store.put("x", b"first", if_absent=True)
    assert not store.put("x", b"second", if_absent=True)
    assert store.get("x") == b"first"


def test_wrong_bucket_and_wrong_key_exit_2_without_secrets(s3: ObjectServer) -> None:
    flags = ["train", "bpe", "tiny", "--data=s3://no-such-bucket/raw"]
    text = tapir(*flags, code=2, **s3.environment)
    assert "no bucket 'no-such-bucket'" in text
    wrong = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrongsecretvalue"}
    text = tapir(*flags, code=2, **wrong)
    assert "check AWS_ACCESS_KEY_ID" in text
    assert "wrongsecretvalue" not in text


@pytest.mark.parametrize("outage", [(1, 2), (2, 3)])
def test_an_outage_at_the_start_of_a_job_is_waited_out(
    s3: ObjectServer, monkeypatch: pytest.MonkeyPatch, outage: tuple[int, ...]
) -> None:
    """The first questions of a job: HEAD of an object that is not there yet, then of its bucket."""
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


def test_a_finished_pack_is_found_again_in_every_store(store: Store, tmp_path: Path) -> None:
    config = PackConfig(count=30, validation=0.3)
    found = pack("shapes", store, config)
    assert pack("shapes", store, config) == found
    with pytest.raises(InputError, match="is taken by another data set"):
        pack("shapes", store, PackConfig(count=31, validation=0.3))
