"""A prefix of a bucket of any S3-compatible object store, through boto3.

s3_answers.py classifies errors, s3_retry.py repeats requests, s3_messages.py explains errors.
"""

import io
import itertools
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from core.config import S3
from core.errors import AbsentError, StoreError, StoreInputError
from core.storage.entry import Entry
from core.storage.s3_answers import (
    BUCKET_IS_OURS,
    code_of,
    is_failed_condition,
    is_no_condition,
    is_past_the_end,
    passes,
)
from core.storage.s3_body import PartStream, read_into
from core.storage.s3_clients import check_environment, refuse_secrets
from core.storage.s3_messages import no_bucket, no_conditional_put
from core.storage.s3_retry import PATIENCE, Retries

_PART = 16 * 2**20
_TRANSFER = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=4)
_TRANSFER.max_in_memory_upload_chunks = 4  # of a stream; s3transfer's default is 10


class S3Store:
    """A prefix of an S3 bucket."""

    def __init__(
        self, bucket: str, prefix: str, attempts: int = 6, patience: float = PATIENCE
    ) -> None:
        """`patience`: seconds of outage to wait out, once the store has answered.

        Before its first answer at most 30 s, and only if the port is open: a wrong endpoint fails
        at once.
        """
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"{S3}{bucket}/{self.prefix}".rstrip("/")
        self._bucket_seen = False
        check_environment()
        self._retries = Retries(self.url, attempts, patience)
        refuse_secrets("the endpoint", self._retries.client.meta.endpoint_url)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read an object or a range; a truncated body is resumed where it ended."""
        parts: list[bytes] = []

        def read(client: Any) -> None:
            got = sum(map(len, parts))
            left = None if length is None else length - got
            if left != 0:
                self._read_into(client, parts, name, start + got, left)

        try:
            self._retries.ask(name, read)
        except StoreError as error:
            if not is_past_the_end(error.__cause__):  # empty, as in a file
                raise
        return b"".join(parts)

    def _read_into(
        self, client: Any, parts: list[bytes], name: str, start: int, length: int | None
    ) -> None:
        """Read a range; bytes received before an error stay in `parts`."""
        extra = {}
        if start or length is not None:
            extra["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        answer = client.get_object(Bucket=self.bucket, Key=self._key(name), **extra)
        read_into(parts, answer, f"{self.url}/{name}", start, length)

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        extra: Any = {"IfNoneMatch": "*"} if if_absent else {}
        key = self._key(name)
        try:
            self._retries.ask(
                name,
                lambda client: client.put_object(Bucket=self.bucket, Key=key, Body=data, **extra),
            )
        except StoreError as error:
            if if_absent and is_failed_condition(error.__cause__):
                return self._holds(name, data)  # ours, if the answer to an earlier attempt was lost
            if if_absent and is_no_condition(error.__cause__):
                raise no_conditional_put(self.url, error) from error.__cause__
            raise
        return True

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.get(name) == data
        except AbsentError:  # it was deleted a moment ago
            return False

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Multipart upload of a large object; boto3 cleans up an aborted one."""
        stream = io.BufferedReader(PartStream(parts), _PART)
        first = stream.read(_PART)
        if len(first) < _PART:
            self.put(name, first)
            return
        rest = itertools.chain([first], iter(lambda: stream.read(_PART), b""))
        body: Any = io.BufferedReader(PartStream(rest), _PART)
        with self._retries.explained(name):
            self._retries.later.upload_fileobj(body, self.bucket, self._key(name), Config=_TRANSFER)

    def names(self, prefix: str = "") -> list[str]:
        return [entry.name for entry in self.entries(prefix)]

    def entries(self, prefix: str = "") -> list[Entry]:
        start = self._key(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0

        def ask(client: Any) -> list[Entry]:
            rows, page = [], {}
            for page in client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=start
            ):
                rows += [_entry(item) for item in page.get("Contents", [])]
            if page.get("IsTruncated") and not page.get("NextContinuationToken"):
                raise StoreError(f"{self.url} lists a part of its objects, and not how to go on")
            kept = (row for row in rows if row.name.startswith(start))
            cuts = (row._replace(name=row.name[cut:]) for row in kept)
            return sorted(row for row in cuts if row.name and not row.name.endswith("/"))

        return self._retries.ask(prefix, ask)

    def exists(self, name: str) -> bool:
        return self._head(name) is not None

    def delete(self, name: str) -> None:
        key = self._key(name)
        with suppress(AbsentError):
            self._retries.ask(
                name, lambda client: client.delete_object(Bucket=self.bucket, Key=key)
            )

    def head(self, name: str) -> tuple[int, str]:
        head = self._head(name)
        if head is None:
            raise AbsentError(f"there is no {name} in {self.url}")
        return int(head.get("ContentLength", 0)), str(head.get("ETag", "")).strip('"')

    def make_bucket(self) -> None:
        """Create the bucket if there is none; for stores that Tapir itself started."""
        try:
            with self._retries.explained(""):
                self._retries.client.create_bucket(Bucket=self.bucket)
        except StoreError as error:
            if code_of(error.__cause__) not in BUCKET_IS_OURS:
                raise

    def _head(self, name: str) -> Any:
        try:
            key = self._key(name)
            return self._retries.ask(
                name, lambda client: client.head_object(Bucket=self.bucket, Key=key)
            )
        except AbsentError:
            self._check_bucket()
            return None

    def _check_bucket(self) -> None:
        """Check once that the bucket exists: HEAD does not say which of the two is missing."""
        if self._bucket_seen:
            return
        try:
            self._retries.ask("", lambda client: client.head_bucket(Bucket=self.bucket))
        except AbsentError as error:
            raise StoreInputError(no_bucket(self.url)) from error
        except StoreError as error:
            if passes(error.__cause__) or not isinstance(error.__cause__, ClientError):
                raise  # a 403 proves nothing: a key may read objects without HEAD on the bucket
        self._bucket_seen = True

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


def _entry(item: Any) -> Entry:
    return Entry(item["Key"], int(item.get("Size", 0)), item.get("ETag", "").strip('"'))
