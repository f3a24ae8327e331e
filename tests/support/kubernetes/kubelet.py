"""Pods as local processes: a container's command with its mounts, host names and variables."""

import os
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.processes import die_with_parent
from core.launch_environment import free_port
from tests.harness import PATH
from tests.support.kubernetes.access import Access
from tests.support.kubernetes.store import Json, Store

TOKENS = "/var/run/secrets/kubernetes.io/serviceaccount"
_PORT = "29500"
_GRACE = 60.0
"""Seconds between TERM and KILL; a test's pods save in less."""


@dataclass
class Pod:
    """A started pod."""

    name: str
    index: int
    process: "subprocess.Popen[bytes]"
    disrupted: bool = False
    """True once its node was lost or it was evicted (condition DisruptionTarget)."""
    asked: float = field(default=0.0)
    """When it was asked to end."""

    @property
    def exit_code(self) -> int | None:
        """As a container runtime reports it: 128 + signal."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def kill(self) -> None:
        """SIGKILL to all its processes, as when a node dies."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Kubelet:
    """Starts and ends the pods of a cluster."""

    def __init__(self, folder: Path, store: Store, access: Access, port: int) -> None:
        self.logs, self._folder = folder / "pods", folder
        self._store, self._access, self._port = store, access, port
        self._ports: dict[str, int] = {}
        self.logs.mkdir(parents=True)

    def start(self, job: Json, index: int) -> Pod:
        """Start a pod of a Job and create its Pod object."""
        spec, metadata = job["spec"], job["metadata"]
        template, is_indexed = spec["template"], spec.get("completionMode") == "Indexed"
        base = f"{metadata['name']}-{index}" if is_indexed else metadata["name"]
        name = f"{base}-{secrets.token_hex(3)[:5]}"
        assert len(name) <= 63, name
        space = metadata["namespace"]
        labels = {**template["metadata"].get("labels", {}), "job-name": metadata["name"]}
        self._store.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": space, "labels": labels},
                "spec": template["spec"],
                "status": {"phase": "Running"},
            },
            "job-controller",
        )
        pod_spec = template["spec"]
        (container,) = pod_spec["containers"]
        with open(self.logs / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [self._local(word, job, pod_spec) for word in container["command"]],
                cwd=container.get("workingDir", "/"),
                env=self._environment(container, index if is_indexed else None),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return Pod(name, index, process)

    def end(self, pod: Pod) -> None:
        """TERM at the first call, KILL after the grace."""
        if not pod.asked:
            pod.asked = time.monotonic()
            pod.process.terminate()
        elif time.monotonic() - pod.asked > _GRACE:
            pod.kill()

    def _environment(self, container: Json, index: int | None) -> dict[str, str]:
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
        given = {each["name"]: each["value"] for each in container.get("env", [])}
        number = {} if index is None else {"JOB_COMPLETION_INDEX": str(index)}
        return {
            **kept,
            "PYTHONPATH": PATH,
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self._port),
            **number,
            **given,
        }

    def _local(self, word: str, job: Json, spec: Json) -> str:
        """A word of a command with local folders, address and port."""
        for path, folder in self._folders(job["metadata"]["namespace"], spec).items():
            if word == path or word.startswith(path + "/"):
                word = str(folder) + word.removeprefix(path)
        name, subdomain = job["metadata"]["name"], spec.get("subdomain")
        if subdomain and f"{name}-0.{subdomain}" in word:
            uid = job["metadata"]["uid"]
            port = self._ports.setdefault(uid, free_port("127.0.0.1"))
            word = word.replace(f"{name}-0.{subdomain}", "127.0.0.1").replace(_PORT, str(port))
        return word

    def _folders(self, space: str, spec: Json) -> dict[str, Path]:
        """Mount path -> local folder of ConfigMaps and of the service account."""
        folders = {}
        (container,) = spec["containers"]
        mounts = {each["name"]: each["mountPath"] for each in container.get("volumeMounts", [])}
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                name = volume["configMap"]["name"]
                data = self._store.get("ConfigMap", space, name)["data"]
                folders[mounts[volume["name"]]] = self._written(f"config-{name}", data)
        if account := spec.get("serviceAccountName"):
            data = {"token": self._access.token_of(space, account), "namespace": space}
            data["ca.crt"] = (self._folder / "ca.crt").read_text()
            folders[TOKENS] = self._written(f"account-{account}", data)
        return folders

    def _written(self, name: str, data: dict[str, Any]) -> Path:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        for key, text in data.items():
            (folder / key).write_text(text)
        return folder
