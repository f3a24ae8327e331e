"""The API server: HTTPS, discovery, create, get, list, watch, patch and delete."""

import contextlib
import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.kubernetes import discovery
from tests.support.kubernetes.access import Access
from tests.support.kubernetes.schemas import problems_of
from tests.support.kubernetes.store import Json, Refused, Store

_WATCH_SECONDS = 60.0
_POLL = 0.05


class ApiServer(ThreadingHTTPServer):
    """Serves a store; `created` is called after a create, before its answer."""

    daemon_threads = True

    def __init__(self, store: Store, context: ssl.SSLContext, logs: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.access, self.logs = store, Access(store), logs
        self.failing = 0
        """So many requests are answered with 503."""
        self.without: tuple[str, ...] = ()
        """API groups that are not installed."""
        self.created: Callable[[Json, str], None] = lambda _body, _user: None
        self._context = context

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(_POLL,), daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        wrapped = self._context.wrap_socket
        # a client may be killed, or not trust us
        with contextlib.suppress(OSError), wrapped(request, server_side=True) as connection:
            super().finish_request(connection, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def log_message(self, *_: Any) -> None:
        """No lines on the test's output."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        try:
            if self.server.failing:
                self.server.failing -= 1
                raise Refused(503, "ServiceUnavailable", "try again")
            user = self.server.access.user(self.headers.get("Authorization", ""))
            self._serve(user, body)
        except Refused as error:
            self._send(
                error.code,
                {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Failure",
                    "reason": error.reason,
                    "message": str(error),
                    "code": error.code,
                },
            )

    def _serve(self, user: str, body: Json) -> None:
        url = urlsplit(self.path)
        self._query = {key: values[0] for key, values in parse_qs(url.query).items()}
        document = discovery.answer(url.path, self.server.without)
        if document is not None:
            return self._send(200, document)
        group, kind, resource, space, name, rest = self._place(url.path)
        watches = self._query.get("watch") in ("true", "1")
        verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(self.command)
        verb = verb or ("get" if name else "watch" if watches else "list")
        self.server.access.check(user, verb, group, resource, space, name)
        if rest == ["log"]:
            return self._send_log(name)
        if verb == "list":
            return self._list(kind, space)
        if verb == "watch":
            return self._watch(kind, space)
        self._send(*getattr(self, f"_{verb}")(kind, space, name, body, user))

    def _place(self, path: str) -> tuple[str, str, str, str, str, list[str]]:
        """API group, kind, resource, namespace, name and what follows of a path."""
        parts = path.strip("/").split("/")
        group = "" if parts[0] == "api" else parts.pop(1)
        version, *rest = [*parts[1:], ""]
        kinds = discovery.KINDS.get((group, version), {})
        rest = [part for part in rest if part]
        is_known = rest[:1] == ["namespaces"] and len(rest) > 2 and rest[2] in kinds
        if not is_known or group in self.server.without:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        _, space, resource, *more = rest
        return group, kinds[resource], resource, space, more[0] if more else "", more[1:]

    def _create(self, kind: str, space: str, _: str, body: Json, user: str) -> tuple[int, Json]:
        if body.get("kind") != kind or body["metadata"].get("namespace", space) != space:
            raise Refused(400, "BadRequest", f"a {kind} of namespace {space} is expected")
        if kind == "Pod":
            raise Refused(405, "MethodNotAllowed", "pods are made by controllers here")
        body["metadata"]["namespace"] = space
        if problems := problems_of(body):
            raise Refused(422, "Invalid", f"{kind} is invalid: {'; '.join(problems)}")
        made = self.server.store.create(body, user)
        self.server.created(made, user)
        return 201, made

    def _get(self, kind: str, space: str, name: str, _body: Json, _user: str) -> tuple[int, Json]:
        return 200, self.server.store.get(kind, space, name)

    def _patch(self, kind: str, space: str, name: str, body: Json, _: str) -> tuple[int, Json]:
        with self.server.store.changed:
            current = self.server.store.get(kind, space, name)
            merged = _merged(current, body)
            if kind in ("Job", "JobSet") and merged["spec"] != current["spec"]:
                raise Refused(422, "Invalid", f"{kind}.spec: field is immutable")
            self.server.store.update(merged)
            return 200, merged

    def _delete(self, kind: str, space: str, name: str, body: Json, user: str) -> tuple[int, Json]:
        with self.server.store.changed:
            current = self.server.store.get(kind, space, name)
            uid = body.get("preconditions", {}).get("uid")
            if uid and uid != current["metadata"]["uid"]:
                raise Refused(409, "Conflict", f"the uid is not {uid}")
            return 200, self.server.store.delete(current, user)

    def _list(self, kind: str, space: str) -> None:
        items = self.server.store.select(kind, space, *self._chosen())
        parts = {"Job": "batch/v1", "JobSet": "jobset.x-k8s.io/v1alpha2"}
        self._send(
            200,
            {
                "kind": f"{kind}List",
                "apiVersion": parts.get(kind, "v1"),
                "metadata": {"resourceVersion": self.server.store.version},
                "items": items,
            },
        )

    def _chosen(self) -> tuple[str, str]:
        name = self._query.get("fieldSelector", "").removeprefix("metadata.name=")
        return self._query.get("labelSelector", ""), name

    def _watch(self, kind: str, space: str) -> None:
        """One JSON line a change, until the client leaves."""
        if "sendInitialEvents" in self._query:  # the client lists first then
            raise Refused(422, "Invalid", "sendInitialEvents: Forbidden: not supported")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        _, name = self._chosen()
        store, position = self.server.store, int(self._query.get("resourceVersion") or 0)
        while True:
            news = store.changes_after(position, _WATCH_SECONDS)
            position += len(news)
            if not news:
                return
            for change, body in news:
                metadata = body["metadata"]
                is_here = body["kind"] == kind and metadata["namespace"] == space
                if is_here and name in ("", metadata["name"]):
                    line = json.dumps({"type": change, "object": body})
                    self.wfile.write(line.encode() + b"\n")
                    self.wfile.flush()

    def _send(self, code: int, body: Json) -> None:
        self._send_bytes(code, "application/json", json.dumps(body).encode())

    def _send_log(self, pod: str) -> None:
        self._send_bytes(200, "text/plain", (self.server.logs / f"{pod}.log").read_bytes())

    def _send_bytes(self, code: int, kind: str, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _merged(current: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386); lists are replaced, and kubectl's $ directives left out."""
    if not isinstance(patch, dict) or not isinstance(current, dict):
        return patch
    merged = dict(current)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif not key.startswith("$"):
            merged[key] = _merged(merged.get(key), value)
    return merged
