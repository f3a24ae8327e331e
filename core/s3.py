"""A prefix of a bucket of any S3-compatible object store, through boto3."""

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectionError,
    EndpointConnectionError,
    EndpointProviderError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    ProxyConnectionError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)

from core.errors import AbsentError, StoreError, StoreInputError
from core.keys import key_fraction
from core.log import LOG

PATIENCE, FIRST_PATIENCE = 300.0, 30.0
_SECONDS, _FIRST_SECONDS = 60, 10
"""For an answer; before the first one a silent port is more likely than a slow store."""
T = TypeVar("T")
_CUT = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
"""A body that ended too early: what came of it counts."""
_CHUNK = 2**20
_PART = 16 * 2**20
_TRANSFER = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=4)
_MISSING = ("404", "NotFound")
"""Of HEAD, which has no body; a GET without the store's own code may be a proxy's."""
_OURS_ALREADY = ("BucketAlreadyExists", "BucketAlreadyOwnedByYou")
_DENIED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_MOVED = ("301", "302", "307", "308", "PermanentRedirect", "TemporaryRedirect")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_HINT = "; it has not answered yet: check the address, and http or https, in AWS_ENDPOINT_URL"
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


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
        self._bucket_seen = self._answered = False
        self._patience = patience
        _check_environment()
        try:
            session = boto3.session.Session()
            self._first = _client_of(session, min(attempts, 2), _FIRST_SECONDS)
            self._later = _client_of(session, attempts, _SECONDS)
        except (ValueError, BotoCoreError) as error:
            raise StoreInputError(
                f"the settings for {self.url} are wrong ({error}); check AWS_ENDPOINT_URL (written "
                "as http://host:port), AWS_DEFAULT_REGION (as us-east-1), AWS_PROFILE and the "
                "files of credentials"
            ) from error
        _refuse_secrets("the endpoint", self._first.meta.endpoint_url)

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
            if _code(error.__cause__) != "InvalidRange":  # behind the end, as in a file
                raise
        return b"".join(parts)

    def _read_into(self, parts: list[bytes], name: str, start: int, length: int | None) -> None:
        """Read a range; what came before an error stays in `parts`."""
        extra = {}
        if start or length is not None:
            extra["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name), **extra)
        parts.extend(answer["Body"].iter_chunks(_CHUNK))

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        extra: Any = {"IfNoneMatch": "*"} if if_absent else {}
        key = self._key(name)
        try:
            self._asked(
                name,
                lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=data, **extra),
            )
        except StoreError as error:
            if if_absent and _code(error.__cause__) in ("PreconditionFailed", "412"):
                return self._holds(name, data)  # ours, if the answer to an earlier attempt was lost
            raise
        return True

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.get(name) == data
        except AbsentError:  # it was deleted a moment ago
            return False

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """A multipart upload; what an aborted one leaves is removed by boto3."""
        body: Any = io.BufferedReader(_Parts(parts), _PART)
        with self._explained(name):
            self._later.upload_fileobj(body, self.bucket, self._key(name), Config=_TRANSFER)

    def names(self, prefix: str = "") -> list[str]:
        start = self._key(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0

        def ask() -> list[str]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=start
            )
            return sorted(item["Key"][cut:] for page in pages for item in page.get("Contents", []))

        return self._asked(prefix, ask)

    def exists(self, name: str) -> bool:
        return self._head(name) is not None

    def delete(self, name: str) -> None:
        key = self._key(name)
        self._asked(name, lambda: self._client.delete_object(Bucket=self.bucket, Key=key))

    def etag(self, name: str) -> str:
        head = self._head(name)
        if head is None:
            raise AbsentError(f"there is no {name} in {self.url}")
        return str(head["ETag"]).strip('"')

    def make_bucket(self) -> None:
        """Create the bucket if there is none; for stores that Tapir itself started."""
        try:
            with self._explained(""):
                self._client.create_bucket(Bucket=self.bucket)
        except StoreError as error:
            if _code(error.__cause__) not in _OURS_ALREADY:
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
            raise StoreInputError(self._no_bucket()) from error
        except StoreError as error:
            if _passes(error.__cause__) or not isinstance(error.__cause__, ClientError):
                raise  # a refusal says nothing: who may read objects need not see the bucket
        self._bucket_seen = True

    def _no_bucket(self) -> str:
        return f"there is no bucket {self.bucket!r} at this endpoint; create it or fix the URL"

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _asked(self, name: str, request: Callable[[], T]) -> T:
        """Do a request; an outage of a store that has answered before is waited out."""
        began, attempt = time.monotonic(), 0
        while True:
            try:
                with self._explained(name):
                    found = request()
                self._answered = True
                return found
            except StoreError as error:
                cause = error.__cause__
                passes = isinstance(cause, _CUT) or _passes(cause)
                self._answered |= isinstance(cause, ClientError) and not passes  # "no" is an answer
                if not passes or time.monotonic() - began > self._waits(cause):
                    raise
                pause = min(0.2 * 2.0**attempt, 10.0)
                pause *= 0.5 + key_fraction(name, attempt, "jitter")
                LOG.warning("%s; again in %.1f s", error, pause)
                time.sleep(pause)
                attempt += 1

    def _waits(self, cause: BaseException | None) -> float:
        """Seconds for which an error that may pass is waited out."""
        if self._answered:
            return self._patience
        listens = isinstance(cause, (ClientError, ConnectionClosedError, *_CUT))
        return min(self._patience, FIRST_PATIENCE) if listens else -1.0

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        where = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except ClientError as error:
            raise self._refused(where, name, error) from error
        except NoCredentialsError as error:
            raise StoreInputError(
                f"no credentials for {self.url}; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        except ParamValidationError as error:
            raise StoreInputError(f"{self.url} is no valid bucket or key: {error}") from error
        except RecursionError as error:  # botocore asks where to, and is sent on again
            raise StoreInputError(self._moved()) from error
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
            hint = "" if self._answered else _HINT
            raise StoreError(f"{where}: {error}{hint}") from error

    def _refused(self, where: str, name: str, error: ClientError) -> StoreError:
        """What the store's answer means."""
        code = _code(error)
        if code == "NoSuchKey" or (code in _MISSING and error.operation_name.startswith("Head")):
            return AbsentError(f"there is no {name} in {self.url}")
        if code == "NoSuchBucket":
            return StoreInputError(self._no_bucket())
        if code in _MOVED:
            return StoreInputError(self._moved())
        if code in _DENIED:
            return StoreInputError(
                f"access denied to {self.url} ({code}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
            )
        return StoreError(f"{where}: {error}{'' if self._answered else _HINT}")

    def _moved(self) -> str:
        return (
            f"what answers for {self.url} sends requests elsewhere; check http or https "
            "in AWS_ENDPOINT_URL, and AWS_DEFAULT_REGION"
        )


def _client_of(session: Any, attempts: int, seconds: int) -> Any:
    """A client that waits so many seconds for an answer."""
    retries: Any = {"mode": "adaptive", "total_max_attempts": attempts}
    path_style: Any = {"addressing_style": "path"}
    config = Config(
        retries=retries,
        connect_timeout=10,
        read_timeout=seconds,
        s3=path_style,
        region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        max_pool_connections=64,
    )
    return session.client("s3", config=config)


def _check_environment() -> None:
    """Refuse what boto3 would repeat in its errors: keys with white space, passwords in URLs."""
    for name in _CREDENTIALS:
        if any(letter.isspace() for letter in os.environ.get(name, "")):
            raise StoreInputError(f"{name} holds white space or a line break; export it without")
    for name in _ENDPOINTS:
        _refuse_secrets(name, os.environ.get(name, ""))


def _refuse_secrets(what: str, url: str) -> None:
    if any(letter in url for letter in "@?"):
        raise StoreInputError(
            f"{what} holds a user, password or query, which S3 does not use; write it as "
            "http://host:port, and export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


class _Parts(io.RawIOBase):
    """Parts in a row, as a file to read from."""

    def __init__(self, parts: Iterable[bytes | memoryview]) -> None:
        self._parts = iter(parts)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part).cast("B")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _code(error: BaseException | None) -> str:
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def _passes(error: BaseException | None) -> bool:
    """Say whether an error may be gone in a while."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return bool(status >= 500 or status == 429)
    return isinstance(error, HTTPClientError | ConnectionError)
