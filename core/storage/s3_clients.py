"""boto3 clients of an object store, configured by the environment."""

import os
from typing import Any

from botocore.config import Config

from core.errors import StoreInputError

_SECONDS, _FIRST_SECONDS = 60, 10
"""Read timeouts; the second until the first answer: a silent port is likelier than a slow store."""
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def clients_of(session: Any, attempts: int, plain: bool) -> tuple[Any, Any]:
    """(client until the first answer, with a shorter timeout; client for all later requests)."""
    first = _client_of(session, min(attempts, 2), _FIRST_SECONDS, plain)
    return first, _client_of(session, attempts, _SECONDS, plain)


def _client_of(session: Any, attempts: int, seconds: int, plain: bool) -> Any:
    """Build a client with a read timeout of `seconds`; `plain`: without checksums."""
    retries: Any = {"mode": "adaptive", "total_max_attempts": attempts}
    path_style: Any = {"addressing_style": "path"}
    checksums: Any = "when_required" if plain else None
    config = Config(
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        retries=retries,
        connect_timeout=10,
        read_timeout=seconds,
        s3=path_style,
        region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        max_pool_connections=64,
    )
    return session.client("s3", config=config)


def check_environment() -> None:
    """Refuse secrets that boto3 would print in errors: keys with white space, passwords in URLs."""
    for name in _CREDENTIALS:
        if any(letter.isspace() for letter in os.environ.get(name, "")):
            raise StoreInputError(f"{name} holds white space or a line break; export it without")
    for name in _ENDPOINTS:
        refuse_secrets(name, os.environ.get(name, ""))


def refuse_secrets(what: str, url: str) -> None:
    if any(letter in url for letter in "@?"):
        raise StoreInputError(
            f"{what} holds a user, password or query, which S3 does not use; write it as "
            "http://host:port, and export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
