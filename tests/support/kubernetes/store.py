"""Objects of the API server, its log, and the changes that watchers read."""

import threading
import time
import uuid
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
COMPONENT = "app.kubernetes.io/component"


class Refused(Exception):
    """A request that is answered with a Status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class Event:
    """A create or a removal that the server carried out."""

    user: str
    verb: str
    kind: str
    name: str
    component: str
    markers: frozenset[str]
    """Markers of stages that existed at that time."""


class Store:
    """All objects by kind, namespace and name; `changed` is notified of each change."""

    def __init__(self, markers: Callable[[], frozenset[str]]) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.log: list[Event] = []
        self.changes: list[tuple[str, Json]] = []
        """(ADDED, MODIFIED or DELETED, object); a resourceVersion is a position in it."""
        self._objects: dict[tuple[str, str, str], Json] = {}
        self._markers = markers

    @property
    def version(self) -> str:
        return str(len(self.changes))

    def get(self, kind: str, space: str, name: str) -> Json:
        with self.changed:
            try:
                return deepcopy(self._objects[kind, space, name])
            except KeyError:
                raise Refused(404, "NotFound", f'{kind} "{name}" not found') from None

    def select(self, kind: str, space: str = "", selector: str = "", name: str = "") -> list[Json]:
        with self.changed:
            return [
                deepcopy(body)
                for (of, where, called), body in sorted(self._objects.items())
                if of == kind and space in ("", where) and name in ("", called)
                if selects(selector, body["metadata"].get("labels", {}))
            ]

    def create(self, body: Json, user: str) -> Json:
        """Raises: Refused if there is an object of that name."""
        with self.changed:
            metadata = body["metadata"]
            key = (body["kind"], metadata["namespace"], metadata["name"])
            if key in self._objects:
                raise Refused(409, "AlreadyExists", f'{key[0]} "{key[2]}" already exists')
            body = deepcopy(body)
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            body["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now}
            self._objects[key] = body
            self._note("ADDED", body, user, "create")
            return deepcopy(body)

    def update(self, body: Json) -> None:
        """Replace an object; no change, no event. An object that has gone stays gone."""
        with self.changed:
            metadata = body["metadata"]
            key = (body["kind"], metadata["namespace"], metadata["name"])
            current = self._objects.get(key)
            if current is None or current["metadata"]["uid"] != metadata["uid"]:
                return
            if {**current, "metadata": {**current["metadata"], "resourceVersion": ""}} == {
                **body,
                "metadata": {**metadata, "resourceVersion": ""},
            }:
                return
            self._objects[key] = deepcopy(body)
            self._note("MODIFIED", self._objects[key])

    def delete(self, body: Json, user: str) -> Json:
        """Mark what has pods as being deleted, and remove all else."""
        with self.changed:
            if body["kind"] not in ("Job", "JobSet"):
                self.remove(body, user)
                return body
            body["metadata"].setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
            self.update(body)
            return body

    def changes_after(self, position: int, seconds: float) -> list[tuple[str, Json]]:
        """Changes since a position; waits for the next one at most so long."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.changes) > position, seconds)
            return self.changes[position:]

    def remove(self, body: Json, user: str) -> None:
        with self.changed:
            metadata = body["metadata"]
            self._objects.pop((body["kind"], metadata["namespace"], metadata["name"]), None)
            self._note("DELETED", body, user, "remove")

    def _note(self, change: str, body: Json, user: str = "", verb: str = "") -> None:
        body["metadata"]["resourceVersion"] = str(len(self.changes) + 1)
        self.changes.append((change, deepcopy(body)))
        if verb:
            metadata = body["metadata"]
            component = metadata.get("labels", {}).get(COMPONENT, "")
            self.log.append(
                Event(user, verb, body["kind"], metadata["name"], component, self._markers())
            )
        self.changed.notify_all()


def selects(selector: str, labels: dict[str, str]) -> bool:
    """Label selectors of the forms a=b and a!=b, joined by commas."""
    for part in filter(None, selector.split(",")):
        name, _, value = part.replace("==", "=").partition("=")
        if name.endswith("!"):
            if labels.get(name[:-1]) == value:
                return False
        elif labels.get(name) != value:
            return False
    return True
