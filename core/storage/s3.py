"""A prefix of a bucket of any S3-compatible object store, through boto3."""

import functools
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    EndpointProviderError,
    NoCredentialsError,
    ParamValidationError,
    ProxyConnectionError,
    SSLError,
)

from core.errors import AbsentError, StoreError, StoreInputError
from core.keys import key_fraction
from core.log import LOG
from core.storage.s3_answers import (
    BUCKET_IS_OURS,
    CUT,
    NO_ANSWER,
    code_of,
    is_behind_the_end,
    is_conflict,
    is_failed_condition,
    is_no_condition,
    is_page,
    may_be_checksums,
    moved,
    no_bucket,
    no_conditional_put,
    passes,
    refusal,
)
from core.storage.s3_body import Parts, read_into
from core.storage.s3_clients import check_environment, clients_of, refuse_secrets

PATIENCE, FIRST_PATIENCE = 300.0, 30.0
T = TypeVar("T")
_CHUNK = 2**20
_PART = 16 * 2**20
_CONFLICTS = 12
"""Tries of a write that others write at the same moment; half a minute at most."""
_TRANSFER = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=4)


class S3Store:
    """A prefix of an S3 bucket."""

    def __init__(
        self, bucket: str, prefix: str, attempts: int = 6, patience: float = PATIENCE
    ) -> None:
        """`patience` is how many seconds of outage are waited out, once the store has answered.

        Before, at most 30 s, and only where something listens: a wrong endpoint is told at once.
        """
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._bucket_seen = self._answered = self._plain = False
        self._patience = patience
        check_environment()
        try:
            session = boto3.session.Session()
            self._make = functools.partial(clients_of, session, attempts)
            self._first, self._later = self._make(plain=False)
        except (ValueError, BotoCoreError) as error:
            raise StoreInputError(
                f"the settings for {self.url} are wrong ({error}); check AWS_ENDPOINT_URL (written "
                "as http://host:port), AWS_DEFAULT_REGION (as us-east-1), AWS_PROFILE and the "
                "files of credentials"
            ) from error
        refuse_secrets("the endpoint", self._first.meta.endpoint_url)

    @property
    def _client(self) -> Any:
        return self._later if self._answered else self._first

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A body that is cut goes on where it ended."""
        parts: list[bytes] = []

        def read() -> None:
            got = sum(map(len, parts))
            left = None if length is None else length - got
            if left != 0:
                self._read_into(parts, name, start + got, left)

        try:
            self._asked(name, read)
        except StoreError as error:
            if not is_behind_the_end(error.__cause__):  # as in a file
                raise
        return b"".join(parts)

    def _read_into(self, parts: list[bytes], name: str, start: int, length: int | None) -> None:
        """Read a range; what came before an error stays in `parts`."""
        extra = {}
        if start or length is not None:
            extra["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name), **extra)
        read_into(parts, answer, f"{self.url}/{name}", start, length)

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        extra: Any = {"IfNoneMatch": "*"} if if_absent else {}
        key = self._key(name)
        try:
            self._asked(
                name,
                lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=data, **extra),
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
        """A multipart upload, if it is large; what an aborted one leaves is removed by boto3."""
        stream = io.BufferedReader(Parts(parts), _PART)
        first = stream.read(_PART)
        if len(first) < _PART:
            self.put(name, first)
            return
        rest = itertools.chain([first], iter(lambda: stream.read(_PART), b""))
        body: Any = io.BufferedReader(Parts(rest), _PART)
        with self._explained(name):
            self._later.upload_fileobj(body, self.bucket, self._key(name), Config=_TRANSFER)

    def names(self, prefix: str = "") -> list[str]:
        start = self._key(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0

        def ask() -> list[str]:
            found, page = [], {}
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=start
            ):
                found += [item["Key"] for item in page.get("Contents", [])]
            if page.get("IsTruncated") and not page.get("NextContinuationToken"):
                raise StoreError(f"{self.url} lists a part of its objects, and not how to go on")
            kept = (key[cut:] for key in found if key.startswith(start))
            return sorted(key for key in kept if key and not key.endswith("/"))  # of consoles

        return self._asked(prefix, ask)

    def exists(self, name: str) -> bool:
        return self._head(name) is not None

    def delete(self, name: str) -> None:
        key = self._key(name)
        with suppress(AbsentError):
            self._asked(name, lambda: self._client.delete_object(Bucket=self.bucket, Key=key))

    def etag(self, name: str) -> str:
        head = self._head(name)
        if head is None:
            raise AbsentError(f"there is no {name} in {self.url}")
        if not head.get("ETag"):
            raise StoreError(f"{self.url}/{name}: the store's answer has no ETag")
        return str(head["ETag"]).strip('"')

    def make_bucket(self) -> None:
        """Create the bucket if there is none; for stores that Tapir itself started."""
        try:
            with self._explained(""):
                self._client.create_bucket(Bucket=self.bucket)
        except StoreError as error:
            if code_of(error.__cause__) not in BUCKET_IS_OURS:
                raise

    def _head(self, name: str) -> Any:
        try:
            key = self._key(name)
            return self._asked(name, lambda: self._client.head_object(Bucket=self.bucket, Key=key))
        except AbsentError:
            self._check_bucket()
            return None

    def _check_bucket(self) -> None:
        """HEAD does not say whether the object or its bucket is missing: ask once."""
        if self._bucket_seen:
            return
        try:
            self._asked("", lambda: self._client.head_bucket(Bucket=self.bucket))
        except AbsentError as error:
            raise StoreInputError(no_bucket(self.url)) from error
        except StoreError as error:
            if passes(error.__cause__) or not isinstance(error.__cause__, ClientError):
                raise  # a refusal says nothing: who may read objects need not see the bucket
        self._bucket_seen = True

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _asked(self, name: str, request: Callable[[], T]) -> T:
        """Do a request; an outage of a store that has answered before is waited out."""
        began, attempt, conflicts = time.monotonic(), 0, 0
        while True:
            try:
                with self._explained(name):
                    found = request()
                self._answered = True
                return found
            except (KeyError, TypeError, ValueError) as error:  # of boto3's readers of answers
                text = f"no S3 store answers so ({error!r}); check AWS_ENDPOINT_URL"
                raise StoreError(f"{self.url}/{name}: {text}") from error
            except StoreError as error:
                cause = error.__cause__
                if not self._plain and may_be_checksums(cause):
                    return self._asked_plainly(name, request, error)
                if is_conflict(cause) and conflicts < _CONFLICTS:
                    pause = min(0.05 * 2.0**conflicts, 3.0)
                    conflicts += 1
                else:
                    self._refuse_or_wait(error, began)
                    pause = min(0.2 * 2.0**attempt, 10.0)
                    attempt += 1
                pause *= 0.5 + key_fraction(name, attempt + conflicts, "jitter")
                LOG.warning("%s; again in %.1f s", error, pause)
                time.sleep(pause)

    def _refuse_or_wait(self, error: StoreError, began: float) -> None:
        """Raise the error, unless it may pass."""
        cause = error.__cause__
        may_pass = isinstance(cause, CUT) or passes(cause)
        self._answered |= isinstance(cause, ClientError) and not may_pass  # "no" is an answer
        if not may_pass or time.monotonic() - began > self._waits(cause):
            raise error

    def _asked_plainly(self, name: str, request: Callable[[], T], error: StoreError) -> T:
        """Do a refused request without checksums, which are new; keep to it if that helps."""
        clients, self._plain = (self._first, self._later), True
        self._first, self._later = self._make(plain=True)
        try:
            found = self._asked(name, request)
        except StoreError as again:
            if may_be_checksums(again.__cause__):
                (self._first, self._later), self._plain = clients, False
                raise error from error.__cause__
            raise
        LOG.warning("%s takes no checksums of requests (%s): they are left out", self.url, error)
        return found

    def _waits(self, cause: BaseException | None) -> float:
        """Seconds for which an error that may pass is waited out."""
        if self._answered and not is_page(cause):
            return self._patience
        listens = isinstance(cause, (ClientError, ConnectionClosedError, *CUT))
        return min(self._patience, FIRST_PATIENCE) if listens else -1.0

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        where = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except ClientError as error:
            hint = "" if self._answered else NO_ANSWER
            raise refusal(self.url, name, error, hint) from error
        except NoCredentialsError as error:
            raise StoreInputError(
                f"no credentials for {self.url}; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        except ParamValidationError as error:
            raise StoreInputError(f"{self.url} is no valid bucket or key: {error}") from error
        except RecursionError as error:  # botocore asks where to, and is sent on again
            raise StoreInputError(moved(self.url)) from error
        except (EndpointConnectionError, EndpointProviderError) as error:
            if self._answered:
                raise StoreError(f"{where}: {error}") from error
            raise StoreInputError(
                f"nothing answers for {self.url}; check AWS_ENDPOINT_URL ({error})"
            ) from error
        except (SSLError, ProxyConnectionError) as error:
            if self._answered:
                raise StoreError(f"{where}: {error}") from error
            raise StoreInputError(
                f"{where}: {error}; check http or https in AWS_ENDPOINT_URL, AWS_CA_BUNDLE and the "
                "proxy's settings"
            ) from error
        except (BotoCoreError, S3UploadFailedError) as error:
            hint = "" if self._answered else NO_ANSWER
            raise StoreError(f"{where}: {error}{hint}") from error
