"""Where data lives: a folder, or a bucket of any S3-compatible object store.

`open_store("s3://bucket/prefix")` reads AWS_ENDPOINT_URL and the credentials from the
environment, as boto3 does; nothing of them is ever written down.
"""

import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    EndpointProviderError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from core.errors import ConfigError, StoreError, StoreInputError
from core.files import TEMPORARY, write_atomic, write_parts
from core.keys import key_fraction
from core.log import LOG

_CUT = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
"""A body that ended too early: what came of it counts."""
_CHUNK = 2**20
_PART = 16 * 2**20
_TRANSFER = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=4)
_MISSING = ("404", "NoSuchKey", "NotFound")
_OURS_ALREADY = ("BucketAlreadyExists", "BucketAlreadyOwnedByYou")
_WRONG_FOLDER = (
    PermissionError,
    FileExistsError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)
_DENIED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")


class Store(Protocol):
    """A flat name space of immutable byte strings; names use forward slashes."""

    url: str

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read an object or a range of it; StoreInputError if there is none."""

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        """Write an object whole; with if_absent, returns False if somebody else was first."""

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write an object that comes in parts; it appears whole or not at all."""

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with the prefix, sorted."""

    def exists(self, name: str) -> bool:
        """Say whether there is such an object."""

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""

    def etag(self, name: str) -> str:
        """The store's version mark of an object."""


class FolderStore:
    """A folder of the file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with open(self._path(name), "rb") as file:
                file.seek(start)
                return file.read() if length is None else file.read(length)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise StoreInputError(f"there is no {name} in {self.root}") from error
        except OSError as error:
            raise StoreError(f"cannot read {self._path(name)}: {error}") from error

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        path = self._path(name)
        try:
            if not if_absent:
                write_atomic(path, data)
                return True
            staged = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
            write_atomic(staged, data)
            try:
                os.link(staged, path)
            except FileExistsError:
                return False
            finally:
                staged.unlink(missing_ok=True)
        except _WRONG_FOLDER as error:
            raise StoreInputError(f"{self.root} cannot be written to: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}") from error
        return True

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        path = self._path(name)
        try:
            write_parts(path, parts)
        except _WRONG_FOLDER as error:
            raise StoreInputError(f"{self.root} cannot be written to: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}") from error

    def names(self, prefix: str = "") -> list[str]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        found = (
            path.relative_to(self.root).as_posix()
            for path in files
            if not path.name.startswith(TEMPORARY)
        )
        return sorted(name for name in found if name.startswith(prefix))

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def delete(self, name: str) -> None:
        path = self._path(name)
        path.unlink(missing_ok=True)
        if path.parent != self.root:
            with suppress(OSError):  # others' files are in it, or it has gone
                path.parent.rmdir()

    def etag(self, name: str) -> str:
        return hashlib.md5(self.get(name), usedforsecurity=False).hexdigest()

    def _path(self, name: str) -> Path:
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(os.path.normpath(self.root)):
            raise StoreInputError(f"{name!r} points outside of {self.root}")
        return path


class S3Store:
    """A prefix of an S3 bucket."""

    def __init__(self, bucket: str, prefix: str, attempts: int = 6) -> None:
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._bucket_seen, self._attempts = False, attempts
        retries: Any = {"mode": "adaptive", "total_max_attempts": attempts}
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        path_style: Any = {"addressing_style": "path"}
        config = Config(
            retries=retries, connect_timeout=10, read_timeout=60, s3=path_style, region_name=region
        )
        try:
            self._client = boto3.session.Session().client("s3", config=config)
        except ValueError as error:
            raise StoreInputError(
                f"AWS_ENDPOINT_URL is wrong ({error}); write it as http://host:port"
            ) from error

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        parts: list[bytes] = []
        for attempt in range(self._attempts):
            got = sum(map(len, parts))
            if length is not None and got >= length:
                break
            left = None if length is None else length - got
            try:
                with self._explained(name):
                    self._read_into(parts, name, start + got, left)
                break
            except StoreError as error:
                if _code(error.__cause__) == "InvalidRange":
                    break  # behind the end, as in a file
                if not isinstance(error.__cause__, _CUT) or attempt + 1 == self._attempts:
                    raise
                pause = min(2.0**attempt, 20.0) * (0.5 + key_fraction(name, attempt, "jitter"))
                got = sum(map(len, parts))
                LOG.warning("%s/%s was cut at byte %d; going on", self.url, name, start + got)
                time.sleep(0.2 * pause)
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
        try:
            with self._explained(name):
                self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **extra)
        except StoreError as error:
            if if_absent and _code(error.__cause__) in ("PreconditionFailed", "412"):
                return False
            raise
        return True

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """A multipart upload; what an aborted one leaves is removed by boto3."""
        body: Any = io.BufferedReader(_Parts(parts), _PART)
        with self._explained(name):
            self._client.upload_fileobj(body, self.bucket, self._key(name), Config=_TRANSFER)

    def names(self, prefix: str = "") -> list[str]:
        start = self._key(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=start
            )
            return sorted(item["Key"][cut:] for page in pages for item in page.get("Contents", []))

    def exists(self, name: str) -> bool:
        return self._head(name) is not None

    def delete(self, name: str) -> None:
        with self._explained(name):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def etag(self, name: str) -> str:
        head = self._head(name)
        if head is None:
            raise StoreInputError(f"there is no {name} in {self.url}")
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
            with self._explained(name):
                return self._client.head_object(Bucket=self.bucket, Key=self._key(name))
        except StoreError as error:
            if _code(error.__cause__) not in _MISSING:
                raise
            self._check_bucket()
            return None

    def _check_bucket(self) -> None:
        """HEAD does not say whether the object or its bucket is missing: ask once."""
        if self._bucket_seen:
            return
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            if _code(error) in _MISSING:
                raise StoreInputError(self._no_bucket()) from error
        self._bucket_seen = True

    def _no_bucket(self) -> str:
        return f"there is no bucket {self.bucket!r} at this endpoint; create it or fix the URL"

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = _code(error)
            if code == "NoSuchBucket":
                hint = self._no_bucket()
            elif code in _DENIED:
                hint = (
                    f"access denied to {self.url} ({code}); check AWS_ACCESS_KEY_ID, "
                    "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
                )
            elif code in _MISSING:
                hint = f"there is no {name} in {self.url}"
            else:
                raise StoreError(f"{self.url}/{name}: {error}") from error
            raise StoreInputError(hint) from error
        except NoCredentialsError as error:
            raise StoreInputError(
                f"no credentials for {self.url}; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        except ParamValidationError as error:
            raise StoreInputError(f"{self.url} is no valid bucket or key: {error}") from error
        except (EndpointConnectionError, EndpointProviderError) as error:
            raise StoreInputError(
                f"nothing answers for {self.url}; check AWS_ENDPOINT_URL ({error})"
            ) from error
        except (BotoCoreError, S3UploadFailedError) as error:
            raise StoreError(f"{self.url}/{name}: {error}") from error


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


def open_store(url: str) -> Store:
    """Open `s3://bucket/prefix` or a folder (which need not exist yet)."""
    if url.startswith("s3://"):
        bucket, _, prefix = url[5:].partition("/")
        if not bucket:
            raise ConfigError(f"{url!r} names no bucket; write s3://bucket/prefix")
        return S3Store(bucket, prefix)
    if "://" in url or url.startswith("pipe:"):
        raise ConfigError(
            f"{url!r} is no store that Tapir reads; give s3://bucket/prefix or a folder"
        )
    return FolderStore(Path(url))


def _code(error: BaseException | None) -> str:
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""
