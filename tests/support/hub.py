"""A loopback server with the upload API of the Hugging Face hub: repositories in memory."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(kw_only=True)
class Hub:
    """What the server holds, and what was sent to it."""

    address: str = ""
    token: str = "right"
    """The only token that may write."""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of each repository, by path."""
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Bodies of large files, by sha256."""
    requests: list[str] = field(default_factory=list)
    broken: str = ""
    """The server answers 500 to addresses that hold this text."""


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve on a free port until the end."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.state.requests.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {self.state.token}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.state.broken and self.state.broken in self.path:
            self._answer({"error": "broken"}, 507)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            rows = [self._mode(row["path"]) for row in json.loads(body)["files"]]
            self._answer({"files": rows})
        elif self.path.endswith("/objects/batch"):
            rows = [self._place(row) for row in json.loads(body)["objects"]]
            self._answer({"objects": rows, "transfer": "basic"})
        elif "/commit/" in self.path:
            self._commit(self.path.split("/models/")[1].split("/commit/")[0], body)
        else:
            self._answer({"error": "no such address"}, 404)

    def do_PUT(self) -> None:
        self.state.requests.append(f"PUT {self.path}")
        length = int(self.headers["Content-Length"])
        self.state.large[self.path.split("/")[-1]] = self.rfile.read(length)
        self._answer({})

    def _create(self, body: dict[str, Any]) -> None:
        name = f"{body['organization']}/{body['name']}"
        if name in self.state.repositories:
            self._answer({"error": "exists", "url": f"{self.state.address}/{name}"}, 409)
            return
        self.state.repositories[name] = {}
        self.state.private[name] = body.get("visibility") == "private" or bool(body.get("private"))
        self._answer({"url": f"{self.state.address}/{name}"})

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _place(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["oid"] in self.state.large:
            return row
        upload = {"href": f"{self.state.address}/large/{row['oid']}", "header": {}}
        return {**row, "actions": {"upload": upload}}

    def _commit(self, name: str, body: bytes) -> None:
        files = self.state.repositories[name]
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                files[row["value"]["path"]] = self.state.large[row["value"]["oid"]]
        url = f"{self.state.address}/{name}/commit/{'0' * 40}"
        self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""
