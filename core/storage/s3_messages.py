"""Messages for errors of an object store: what failed, where, and what to do."""

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    EndpointProviderError,
    NoCredentialsError,
    ParamValidationError,
    ProxyConnectionError,
    SSLError,
)

from core.config import S3
from core.errors import AbsentError, StoreError, StoreInputError
from core.storage.s3_answers import (
    EXPIRED,
    FULL,
    NOT_IMPLEMENTED,
    code_of,
    is_conflict,
    is_page,
    status_of,
)

EXPLAINED = (ClientError, BotoCoreError, S3UploadFailedError, RecursionError)
"""Errors of a request that `explanation` translates."""
_NO_ANSWER = "; it has not answered yet: check the address, and http or https, in AWS_ENDPOINT_URL"
_MISSING = ("404", "NotFound")
"""Codes of HEAD, whose answer has no body; on a GET they may be a proxy's."""
_DENIED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "401")


def explanation(error: Exception, url: str, name: str, answered: bool) -> StoreError:
    """Translate an error of a request; `answered`: the store has answered before."""
    where = f"{url}/{name}".rstrip("/")
    hint = "" if answered else _NO_ANSWER
    if isinstance(error, ClientError):
        return _refusal(url, name, error, hint)
    if isinstance(error, NoCredentialsError):
        return StoreInputError(
            f"no credentials for {url}; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, ParamValidationError):
        return StoreInputError(f"{url} is not a valid bucket or key: {error}")
    if isinstance(error, RecursionError):  # botocore follows redirects in a circle
        return StoreInputError(_moved(url))
    if not answered and isinstance(error, EndpointConnectionError | EndpointProviderError):
        return StoreInputError(f"nothing answers for {url}; check AWS_ENDPOINT_URL ({error})")
    if not answered and isinstance(error, SSLError | ProxyConnectionError):
        return StoreInputError(
            f"{where}: {error}; check http or https in AWS_ENDPOINT_URL, AWS_CA_BUNDLE and the "
            "proxy's settings"
        )
    return StoreError(f"{where}: {error}{hint}")


def unreadable(url: str, name: str, error: Exception) -> StoreError:
    """The error for an answer that boto3 cannot parse."""
    return StoreError(f"{url}/{name}: no S3 store answers so ({error!r}); check AWS_ENDPOINT_URL")


def wrong_settings(url: str, error: Exception) -> StoreInputError:
    """The error for settings that boto3 rejects."""
    return StoreInputError(
        f"the settings for {url} are wrong ({error}); check AWS_ENDPOINT_URL (written "
        "as http://host:port), AWS_DEFAULT_REGION (as us-east-1), AWS_PROFILE and the "
        "files of credentials"
    )


def _refusal(url: str, name: str, error: ClientError, hint: str) -> StoreError:
    """Translate a refused request; `hint` is added where the address may be wrong."""
    code, status, operation = code_of(error), status_of(error), error.operation_name
    where = f"{url}/{name}".rstrip("/")
    if code == "NoSuchKey" or (code in _MISSING and operation.startswith(("Head", "Delete"))):
        return AbsentError(f"there is no {name} in {url}")
    if code == "NoSuchBucket":
        return StoreInputError(no_bucket(url))
    if 300 <= status < 400:
        return StoreInputError(_moved(url))
    if code == "RequestTimeTooSkewed":
        return StoreInputError(
            f"{url} refuses requests because of this machine's clock ({code}); set the clock: "
            "chronyc makestep, or systemctl restart chronyd"
        )
    if code in EXPIRED:
        return StoreInputError(
            f"the credentials for {url} have expired ({code}); export fresh AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        )
    if code in _DENIED or status in (401, 403):
        return StoreInputError(
            f"access denied to {url} ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_ENDPOINT_URL"
        )
    if status in NOT_IMPLEMENTED:
        return StoreInputError(
            f"what answers for {url} does not implement {operation} ({status} {code}); use a store "
            "that does, or check that AWS_ENDPOINT_URL is that of an S3 store and of no proxy"
        )
    if code in FULL or status == 507:
        return StoreError(f"{url} is full ({status} {code}): free space there, or raise its quota")
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
    """The error for a store without conditional writes."""
    cause = error.__cause__
    return StoreInputError(
        f"{url} does not implement conditional writes (If-None-Match on PUT: {status_of(cause)} "
        f"{code_of(cause)}), by which jobs take turns; use a store that does, or a folder; or "
        "AWS_ENDPOINT_URL is that of no S3 store"
    )


def no_bucket(url: str) -> str:
    bucket = url.removeprefix(S3).partition("/")[0]
    return f"there is no bucket {bucket!r} at this endpoint; create it or fix the URL"


def _moved(url: str) -> str:
    return (
        f"what answers for {url} sends requests elsewhere; check http or https "
        "in AWS_ENDPOINT_URL, and AWS_DEFAULT_REGION"
    )
