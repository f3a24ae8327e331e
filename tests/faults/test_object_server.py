"""The private object server after a kill -9: stored objects are readable as soon as it is up."""

import os
import signal
from pathlib import Path

import pytest

from cluster.object_server import object_server
from core.storage.s3 import S3Store


@pytest.mark.world
def test_a_killed_server_comes_back_with_its_objects(tmp_path: Path) -> None:
    with object_server(tmp_path, "first") as server, server.credentials():
        other = S3Store("other", "")
        other.make_bucket()
        for store in (S3Store("first", "a"), other):
            store.put("object", bytes(100_000))
        os.kill(server.pid, signal.SIGKILL)
    with object_server(tmp_path, "first") as server, server.credentials():
        for store in (S3Store("first", "a", attempts=1), S3Store("other", "", attempts=1)):
            assert store.get("object") == bytes(100_000)
