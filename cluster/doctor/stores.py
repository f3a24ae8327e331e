"""Access rights, speed and clock of the data's object store or folder."""

import email.utils
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Any

from cluster.doctor.finding import MB, Finding, bad, clock_finding, ok, warning
from cluster.doctor.folders import existing
from core.config import S3
from core.errors import StoreError, TapirError
from core.storage.s3 import S3Store
from core.storage.store import FolderStore, Store

PROBES = ".tapir-doctor"
SLOW = 1.0
"""MB/s below which a job waits for its data; probes are small, so latency counts."""
_CLOCK_SECONDS = 5.0
_OTHER = b"another writer"
_WRONG_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "403")
_SKEWED = "RequestTimeTooSkewed"


class _Unreachable(Exception):
    """No request can succeed; holds the row that explains why."""

    def __init__(self, row: Finding) -> None:
        super().__init__(row.observed)
        self.row = row


def store_findings(url: str, rights: str, size: int) -> list[Finding]:
    """Test every right with a probe object of `size` bytes, which is deleted."""
    try:
        return _try_rights(_open(url, rights), rights, size)
    except _Unreachable as failed:
        return [failed.row]


def store_clock_findings() -> list[Finding]:
    """Compare this machine's clock with the Date header of the store's endpoint."""
    endpoint = _endpoint()
    before = time.time()
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=_CLOCK_SECONDS) as answer:
            date = answer.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date", "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return [warning("clock", f"the store does not tell the time ({reason})", _NO_ANSWER)]
    after = time.time()
    try:
        there = email.utils.parsedate_to_datetime(date).replace(tzinfo=UTC).timestamp()
    except (TypeError, ValueError):
        return [warning("clock", "the store's answers have no Date", _NO_ANSWER)]
    offset = (before + after) / 2 - (there + 0.5)  # a Date has whole seconds
    return [clock_finding(offset, "the store's")]


_NO_ANSWER = "check AWS_ENDPOINT_URL; compare this machine's clock by chronyc tracking"


def _open(url: str, rights: str) -> Store:
    """Open a store that fails at once instead of waiting out an outage."""
    try:
        if url.startswith(S3):
            bucket, _, prefix = url.removeprefix(S3).partition("/")
            return S3Store(bucket, prefix, attempts=2, patience=0)
        if rights == "read" and not Path(url).is_dir():
            text = f"there is no folder {url} on this machine"
            raise _Unreachable(bad("store", text, "mount it here, or fix --data"))
        return FolderStore(existing(Path(url)))
    except TapirError as error:
        fix = "export AWS_ENDPOINT_URL=<its address>"
        raise _Unreachable(bad("store", str(error), fix)) from error


def _try_rights(store: Store, rights: str, size: int) -> list[Finding]:
    name = f"{PROBES}/{uuid.uuid4().hex}"
    body = os.urandom(size)
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    kept: list[bool] = []

    def attempt(right: str, action: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            action()
            seconds[right] = time.perf_counter() - began
        except StoreError as error:
            refused[right] = _why(store.url, error)

    def read() -> None:
        if "write" not in seconds:
            store.exists(name)
        elif store.get(name) != body:
            raise StoreError(f"{name} reads back other bytes than were written")

    attempt("list", lambda: store.names(f"{name}/"))
    if rights == "write":
        attempt("write", lambda: store.put(name, body))
    attempt("read", read)
    if "write" in seconds:
        attempt("conditional put", lambda: kept.append(store.put(name, _OTHER, if_absent=True)))
        attempt("delete", lambda: store.delete(name))
        if "delete" in refused:
            refused["delete"] += f", so {name} stays there"
    return [*_rights_rows(store.url, seconds, refused, kept), *_speed(store.url, seconds, size)]


def _rights_rows(
    url: str, seconds: dict[str, float], refused: dict[str, str], kept: list[bool]
) -> list[Finding]:
    if kept == [True]:
        text = f"{url} overwrites what a conditional put (If-None-Match) must keep"
        return [bad("store rights", text, "use a store that keeps to it: jobs take leases by it")]
    may = ", ".join(seconds) or "nothing"
    if not refused:
        return [ok("store rights", f"{url}: may {may}")]
    reasons = "; ".join(sorted(set(refused.values())))
    text = f"{url}: may {may}; may not {', '.join(refused)} ({reasons})"
    fix = (
        f"give this key the right to {', '.join(refused)} there (bucket policy or identity), or "
        "use another key; --rights read if nothing is to be written"
    )
    return [bad("store rights", text, fix)]


def _speed(url: str, seconds: dict[str, float], size: int) -> list[Finding]:
    if not {"write", "read"} <= seconds.keys():
        return []
    written, read = size / MB / seconds["write"], size / MB / seconds["read"]
    text = f"{url}: {written:.1f} MB/s written, {read:.1f} MB/s read, by one connection"
    if min(written, read) < SLOW:
        fix = "use a store nearer to the nodes, or look at their network"
        return [warning("store speed", text, fix)]
    return [ok("store speed", text)]


def _why(url: str, error: StoreError) -> str:
    """The reason why one right is missing.

    Raises: _Unreachable if all other requests would fail, too.
    """
    response: Any = getattr(error.__cause__, "response", None)
    if response is None and url.startswith(S3):
        fix = "export AWS_ENDPOINT_URL=<its address>; is the server up, and reachable from here?"
        if "no credentials" in str(error):
            fix = "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise _Unreachable(bad("store", str(error), fix)) from error
    code = str(response.get("Error", {}).get("Code", "")) if response else ""
    if code in _WRONG_KEY:
        text = f"{url} refuses the key ({code})"
        fix = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: mistyped, or another store's"
        raise _Unreachable(bad("store", text, fix)) from error
    if code == _SKEWED:
        text = f"{url} refuses requests because of this machine's clock"
        fix = "set the clock: chronyc makestep, or systemctl restart chronyd"
        raise _Unreachable(bad("store", text, fix)) from error
    if code == "NoSuchBucket":
        fix = "create the bucket, or fix --data"
        raise _Unreachable(bad("store", str(error), fix)) from error
    return code or str(error)


def _endpoint() -> str:
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return given or f"https://s3.{region}.amazonaws.com"
