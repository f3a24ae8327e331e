"""Classify errors of an object store: transient, conflict, not implemented and so on.

Stores differ in what they implement; only HTTP status and error code are used.
"""

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

CUT = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
"""A truncated body; the bytes received so far are kept."""
BUCKET_IS_OURS = ("BucketAlreadyExists", "BucketAlreadyOwnedByYou")
NOT_IMPLEMENTED = (405, 411, 417, 501, 505)
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken")
FULL = ("507", "QuotaExceeded", "XMinioStorageFull", "XMinioStorageQuotaExceeded")
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted", "Conflict", "409")
_BUSY = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests")
_BUSY_STATUS = (408, 425, 429)
_UNKNOWN = ("400", "BadRequest", "InvalidArgument", "InvalidRequest", "NotImplemented")
_CHECKSUM_STATUS = (400, 411, 501)
_CHECKSUM_CODES = ("SignatureDoesNotMatch", "XAmzContentSHA256Mismatch")


def code_of(error: BaseException | None) -> str:
    """The store's error code, or the HTTP status of an answer without one."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def status_of(error: BaseException | None) -> int:
    """The HTTP status of an answer, 0 if there was none."""
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def passes(error: BaseException | None) -> bool:
    """True for a transient error."""
    if not isinstance(error, ClientError):
        return isinstance(error, HTTPClientError | ConnectionError)
    status, code = status_of(error), code_of(error)
    if status in NOT_IMPLEMENTED or code in FULL or status == 507:
        return False
    return status >= 500 or status in _BUSY_STATUS or code in _BUSY


def is_conflict(error: BaseException | None) -> bool:
    """True if another writer wrote the same name at the same time; a retry is safe."""
    return status_of(error) == 409 and code_of(error) in _CONFLICTS


def is_failed_condition(error: BaseException | None) -> bool:
    """True if a conditional write was refused because the object exists."""
    return status_of(error) == 412


def is_no_condition(error: BaseException | None) -> bool:
    """True if the store does not implement conditional writes."""
    status = status_of(error)
    return status in NOT_IMPLEMENTED or (status == 400 and code_of(error) in _UNKNOWN)


def is_page(error: BaseException | None) -> bool:
    """True if the answer may be a web page: boto3 reports one as an error 500 without a code.

    An error 500 without a body comes from a store or its proxy.
    """
    if not isinstance(error, ClientError) or code_of(error) != "500":
        return False
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return bool(headers.get("content-length") != "0")


def is_past_the_end(error: BaseException | None) -> bool:
    """True if a range begins past the object's end."""
    return status_of(error) == 416


def may_be_checksums(error: BaseException | None) -> bool:
    """True if a store may have refused a request because of its checksum."""
    code = code_of(error)
    if code in EXPIRED or code in _BUSY:
        return False
    return status_of(error) in _CHECKSUM_STATUS or code in _CHECKSUM_CODES
