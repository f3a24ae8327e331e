"""The API server as a pod sees it: create, get and delete, by HTTPS and the pod's own token."""

import json
import os
import ssl
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from cluster.kubernetes.stages import JOBSET_VERSION
from core.errors import InputError, TapirError
from core.files.atomic import Json

_ANSWER_SECONDS = 30
_PATHS = {
    "Service": "/api/v1/namespaces/{space}/services",
    "Job": "/apis/batch/v1/namespaces/{space}/jobs",
    "JobSet": f"/apis/{JOBSET_VERSION}/namespaces/{{space}}/jobsets",
}
_ABSENT, _CONFLICT = 404, 409


class ApiError(TapirError):
    """The API server did not answer, or refused a request."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status
        """HTTP status; 0 = no answer."""


class ApiClient:
    """Requests to the API server for the kinds that stages have.

    `folder`: the service account's token and ca.crt.
    Raises: InputError outside a pod, or without a token; ApiError by every method if the server
    does not answer, or refuses.
    """

    def __init__(self, folder: Path) -> None:
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
        if not host or not port:
            raise InputError("the driver runs in a pod of the cluster; `tapir submit` sends it")
        try:
            context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        except OSError as error:
            raise InputError(f"{folder}/ca.crt cannot be read: {error}") from error
        self._token = folder / "token"
        self._address = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        # a cluster's proxy variables are for the world outside it
        self._opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))

    def get(self, kind: str, space: str, name: str) -> Json | None:
        """An object; None if there is none."""
        try:
            return self._ask("GET", f"{_path(kind, space)}/{quote(name)}")
        except ApiError as error:
            if error.status == _ABSENT:
                return None
            raise

    def create(self, body: dict[str, Any]) -> bool:
        """Create an object; False if one of that name exists. Unknown fields are refused."""
        path = _path(body["kind"], body["metadata"]["namespace"])
        try:
            self._ask("POST", f"{path}?fieldValidation=Strict", body)
        except ApiError as error:
            if error.status == _CONFLICT:
                return False
            raise
        return True

    def delete(self, current: Json) -> None:
        """Delete this very object, after its pods; it is there until they have ended."""
        metadata = current["metadata"]
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": metadata["uid"]}}
        path = f"{_path(current['kind'], metadata['namespace'])}/{quote(metadata['name'])}"
        try:
            self._ask("DELETE", path, options)
        except ApiError as error:
            if error.status not in (_ABSENT, _CONFLICT):
                raise

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Json:
        try:
            token = self._token.read_text().strip()  # Kubernetes replaces it every hour
        except OSError as error:
            raise ApiError(f"{self._token} cannot be read: {error}") from error
        request = Request(
            self._address + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {token}",
                "Content-Type": "application/json",
                "Accept": "application/json",
            },
            method=method,
        )
        try:
            with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return dict(json.load(answer))
        except HTTPError as error:
            text = f"{method} {path}: {error.code} {_message(error)}"
            raise ApiError(text, error.code) from error
        except (OSError, ValueError) as error:
            raise ApiError(f"{method} {self._address}{path}: {error}") from error


def _path(kind: str, space: str) -> str:
    return _PATHS[kind].format(space=quote(space))


def _message(error: HTTPError) -> str:
    """The message of the server's Status object."""
    try:
        return str(json.load(error)["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
