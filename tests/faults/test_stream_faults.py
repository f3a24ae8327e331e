"""A stream from S3 through a failing proxy: complete, or stopped with the shard's name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.support.proxy import Plan, faulty_proxy
from bench.support.synthetic import write_tokens
from cluster.object_server import ObjectServer
from core.errors import CorruptError, StoreError
from core.storage.s3 import S3Store
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.stream import Stream
from tests.faults.conftest import Record

BUCKET, SHARDS, RECORDS = "tapir-tests", 4, 64
ORDER = OrderConfig(lanes=4, shuffle_buffer=2)


@pytest.fixture(scope="module")
def stored(s3: ObjectServer) -> str:
    """A prefix with a small token data set."""
    with s3.credentials():
        write_tokens(S3Store(BUCKET, "streamed"), SHARDS, RECORDS, 8, grid=4, text=5)
    return "streamed"


@contextmanager
def _proxied(s3: ObjectServer, monkeypatch: pytest.MonkeyPatch, plan: Plan) -> Iterator[None]:
    with faulty_proxy(s3.endpoint, plan) as address:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        yield


def _epoch(prefix: str, patience: float = 60) -> list[int]:
    """The ids of an epoch, sorted."""
    source = TokenSource(S3Store(BUCKET, prefix, attempts=2, patience=patience), "train")
    loader = LoaderConfig(readers=4, prefetch=4)
    stream = Stream(source, seed=0, batch=16, order=ORDER, loader=loader)
    ids: list[int] = []
    batches = iter(stream)
    for _ in range(stream.order.steps(0)):
        ids += next(batches)[0].ids.tolist()
    batches.close()  # type: ignore[attr-defined]
    return sorted(ids)


@pytest.mark.world
@pytest.mark.parametrize("what", ["503", "reset", "cut", "wait 0.05"])
def test_a_stream_through_a_failing_store_is_complete(
    s3: ObjectServer, stored: str, monkeypatch: pytest.MonkeyPatch, fault: Record, what: str
) -> None:
    fault(29, f"a stream from S3, which does this to every third request: {what}")
    with s3.credentials():
        whole = _epoch(stored)
    assert len(set(whole)) == SHARDS * RECORDS
    asked: list[int] = []

    def plan(number: int, method: str, path: str) -> str:
        asked.append(number)
        return what if number % 3 == 0 and method == "GET" else ""

    with _proxied(s3, monkeypatch, plan):
        assert _epoch(stored) == whole
    assert len(asked) > 30
    fault.outcome("every record of the epoch, once")


@pytest.mark.world
def test_a_dead_shard_ends_the_stream_by_name(
    s3: ObjectServer, stored: str, monkeypatch: pytest.MonkeyPatch, fault: Record
) -> None:
    fault(29, "a stream from S3 with one dead shard: missing, damaged, answered by 500")
    where = r"s3://tapir-tests/streamed/train/shard-000002.tar"
    dead = {"what": ""}

    def plan(number: int, method: str, path: str) -> str:
        return dead["what"] if "shard-000002.tar" in path else ""

    name = "train/shard-000002.tar"
    with s3.credentials():
        store = S3Store(BUCKET, stored)
        data = store.get(name)
        store.delete(name)
    with _proxied(s3, monkeypatch, plan):
        with pytest.raises(CorruptError, match=rf"{where}: the block at offset \d+ \(crc32 \w+\)"):
            _epoch(stored)
        for status, patience in (("500", 1.0), ("404", 60.0)):  # a store's 404 says NoSuchKey
            dead["what"] = status
            with pytest.raises(StoreError, match=re.escape(where)):
                _epoch(stored, patience)
    with s3.credentials():
        store.put(name, data[:600] + bytes([data[600] ^ 1]) + data[601:])
        message = rf"{where}: .*offset \d+ has crc32 \w+ over \d+ bytes, its index says \w+"
        with pytest.raises(CorruptError, match=message):
            _epoch(stored)
        store.put(name, data[: len(data) // 2])
        with pytest.raises(CorruptError, match=where):
            _epoch(stored)
        store.put(name, data)
    fault.outcome("stopped; shard, offset and both digests named")
