"""What the answers of an object store mean: which pass, which do not, and what to do about them.

Stores differ in what they implement; each answer is judged by its status and its code alone.
"""

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from core.errors import AbsentError, StoreError, StoreInputError

CUT = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
"""A body that ended too early: what came of it counts."""
NO_ANSWER = "; it has not answered yet: check the address, and http or https, in AWS_ENDPOINT_URL"
BUCKET_IS_OURS = ("BucketAlreadyExists", "BucketAlreadyOwnedByYou")
_NOT_IMPLEMENTED = (405, 411, 417, 501, 505)
_MISSING = ("404", "NotFound")
"""Of HEAD, which has no body; a GET without the store's own code may be a proxy's."""
_DENIED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "401")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken")
_FULL = ("507", "QuotaExceeded", "XMinioStorageFull", "XMinioStorageQuotaExceeded")
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted", "Conflict", "409")
_BUSY = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests")
_BUSY_STATUS = (408, 425, 429)
_UNKNOWN = ("400", "BadRequest", "InvalidArgument", "InvalidRequest", "NotImplemented")
_CHECKSUM_STATUS = (400, 411, 501)
_CHECKSUM_CODES = ("SignatureDoesNotMatch", "XAmzContentSHA256Mismatch")


def code_of(error: BaseException | None) -> str:
    """The store's own code, or the status of an answer without one."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def status_of(error: BaseException | None) -> int:
    """The status of an answer, 0 if there was none."""
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def passes(error: BaseException | None) -> bool:
    """Say whether an error may be gone in a while."""
    if not isinstance(error, ClientError):
        return isinstance(error, HTTPClientError | ConnectionError)
    status, code = status_of(error), code_of(error)
    if status in _NOT_IMPLEMENTED or code in _FULL or status == 507:
        return False
    return status >= 500 or status in _BUSY_STATUS or code in _BUSY


def is_conflict(error: BaseException | None) -> bool:
    """Say whether another writer was at the same name at the same moment: the next try is sound."""
    return status_of(error) == 409 and code_of(error) in _CONFLICTS


def is_failed_condition(error: BaseException | None) -> bool:
    """Say whether a conditional write was refused because there is an object."""
    return status_of(error) == 412


def is_no_condition(error: BaseException | None) -> bool:
    """Say whether a conditional write was refused because the store knows none."""
    status = status_of(error)
    return status in _NOT_IMPLEMENTED or (status == 400 and code_of(error) in _UNKNOWN)


def is_page(error: BaseException | None) -> bool:
    """Say whether an answer may be a web page: boto3 takes one for an error 500 without a code.

    An error 500 without a body is a store's, or its proxy's.
    """
    if not isinstance(error, ClientError) or code_of(error) != "500":
        return False
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return bool(headers.get("content-length") != "0")


def is_behind_the_end(error: BaseException | None) -> bool:
    """Say whether a range begins where the object has ended."""
    return status_of(error) == 416


def may_be_checksums(error: BaseException | None) -> bool:
    """Say whether a store may have refused a request because of its checksum."""
    code = code_of(error)
    if code in _EXPIRED or code in _BUSY:
        return False
    return status_of(error) in _CHECKSUM_STATUS or code in _CHECKSUM_CODES


def refusal(url: str, name: str, error: ClientError, hint: str) -> StoreError:
    """What a refused request becomes; `hint` is added where the address may be wrong."""
    code, status, operation = code_of(error), status_of(error), error.operation_name
    where = f"{url}/{name}".rstrip("/")
    if code == "NoSuchKey" or (code in _MISSING and operation.startswith(("Head", "Delete"))):
        return AbsentError(f"there is no {name} in {url}")
    if code == "NoSuchBucket":
        return StoreInputError(no_bucket(url))
    if 300 <= status < 400:
        return StoreInputError(moved(url))
    if code == "RequestTimeTooSkewed":
        return StoreInputError(
            f"{url} refuses requests because of this machine's clock ({code}); set the clock: "
            "chronyc makestep, or systemctl restart chronyd"
        )
    if code in _EXPIRED:
        return StoreInputError(
            f"the credentials for {url} have expired ({code}); export fresh AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        )
    if code in _DENIED or status in (401, 403):
        return StoreInputError(
            f"access denied to {url} ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_ENDPOINT_URL"
        )
    if status in _NOT_IMPLEMENTED:
        return StoreInputError(
            f"what answers for {url} does not implement {operation} ({status} {code}); use a store "
            "that does, or check that AWS_ENDPOINT_URL is that of an S3 store and of no proxy"
        )
    if code in _FULL or status == 507:
        return StoreError(f"{url} is full ({status} {code}): free room there, or raise its quota")
    if is_conflict(error):
        return StoreError(
            f"{where}: another writer was at it at each try ({status} {code}); start the same again"
        )
    if is_page(error):
        hint = "; it may be no S3 store but a web page that answers: check AWS_ENDPOINT_URL"
    if status == 400:
        hint += "; check AWS_DEFAULT_REGION and the credentials"
    return StoreError(f"{where}: {error}{hint}")


def no_conditional_put(url: str, error: StoreError) -> StoreInputError:
    """A store that cannot keep what is there."""
    cause = error.__cause__
    return StoreInputError(
        f"{url} does not implement conditional writes (If-None-Match on PUT: {status_of(cause)} "
        f"{code_of(cause)}), by which jobs take turns; use a store that does, or a folder; or "
        "AWS_ENDPOINT_URL is that of no S3 store"
    )


def no_bucket(url: str) -> str:
    bucket = url.removeprefix("s3://").partition("/")[0]
    return f"there is no bucket {bucket!r} at this endpoint; create it or fix the URL"


def moved(url: str) -> str:
    return (
        f"what answers for {url} sends requests elsewhere; check http or https "
        "in AWS_ENDPOINT_URL, and AWS_DEFAULT_REGION"
    )
