"""A whole cluster for a test: API server, controllers, and a kubeconfig for its administrator."""

import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.kubernetes.api_server import ApiServer
from tests.support.kubernetes.jobs import JobController
from tests.support.kubernetes.jobsets import JobSetController, Kueue
from tests.support.kubernetes.kubelet import Kubelet
from tests.support.kubernetes.store import Event, Json, Store

_TICK = 0.05


class Cluster:
    """Start with `running_cluster`."""

    def __init__(self, folder: Path, out: Path) -> None:
        markers = out / "markers"
        self.store = Store(lambda: frozenset(path.name for path in markers.glob("*.json")))
        context = _certified(folder)
        self.server = ApiServer(self.store, context, folder / "pods")
        kubelet = Kubelet(folder, self.store, self.server.access, self.server.port)
        self.jobs = JobController(self.store, kubelet)
        self._controllers = (self.jobs, JobSetController(self.store), Kueue(self.store))
        self._lock, self._over = threading.Lock(), threading.Event()
        self._killed: set[str] = set()
        self.problems: list[str] = []
        """Errors of the controllers themselves."""
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(_kubeconfig(folder, self.server.port)))

    def start(self) -> None:
        self.server.start()
        threading.Thread(target=self._control, daemon=True).start()

    def stop(self) -> None:
        self._over.set()
        with self._lock:
            self.jobs.stop()
        self.server.shutdown()
        self.server.server_close()

    def kill_driver_after_each_create(self, driver: str) -> None:
        """SIGKILL the driver at the first create of each stage: done, but not yet answered."""

        def created(body: Json, user: str) -> None:
            name = f"{body['kind']} {body['metadata']['name']}"
            if not user.endswith(f":{driver}") or name in self._killed:
                return
            self._killed.add(name)
            for pod in self.jobs.pods_of(driver):
                pod.kill()

        self.server.created = created

    @property
    def killed(self) -> set[str]:
        """Objects whose create cost the driver its life."""
        return self._killed

    def created(self, *kinds: str) -> list[Event]:
        """Creates in their order; all kinds if none is given."""
        return [
            event
            for event in self.store.log
            if event.verb == "create" and (not kinds or event.kind in kinds)
        ]

    def _control(self) -> None:
        while not self._over.wait(_TICK):
            with self._lock:
                if self._over.is_set():
                    return
                for controller in self._controllers:
                    try:
                        controller.tick()
                    except Exception as error:
                        self.problems.append(repr(error))


@contextmanager
def serving_cluster(folder: Path, out: Path) -> Iterator[Cluster]:
    """A cluster without controllers: no pod starts, the test itself sets what happens."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, out)
    cluster.server.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def running_cluster(folder: Path, out: Path) -> Iterator[Cluster]:
    """A cluster in a folder; `out` is where the chain's markers are."""
    folder.mkdir(parents=True)
    cluster = Cluster(folder, out)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
    assert not cluster.problems, cluster.problems[:3]


def _certified(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate of its own, made for this run by openssl."""
    key, certificate = folder / "server.key", folder / "ca.crt"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command = [*make.split(), "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def _kubeconfig(folder: Path, port: int) -> Json:
    server = {"server": f"https://127.0.0.1:{port}", "certificate-authority": f"{folder}/ca.crt"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": server}],
        "users": [{"name": "admin", "user": {"token": "token-of-admin"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "current-context": "test",
    }
