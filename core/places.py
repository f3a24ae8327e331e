"""Addresses of data, as text: they are checked without a client of an object store."""

import re
from pathlib import Path

S3 = "s3://"


def place_problems(place: str, setting: str = "") -> list[str]:
    """What is wrong with `s3://bucket/prefix` or a folder, named by its setting if it has one.

    Nothing is looked up.
    """
    named = f"{setting}={place!r}" if setting else repr(place)
    if place.startswith(S3) and not place.removeprefix(S3).partition("/")[0]:
        return [f"{named} names no bucket; write s3://bucket/prefix"]
    if not place.startswith(S3) and ("://" in place or place.startswith("pipe:")):
        return [f"{named} is no store that Tapir reads; give s3://bucket/prefix or a folder"]
    return []


def folder_problems(folder: Path, setting: str) -> list[str]:
    """What is wrong with a folder that must not be an address: it would be one called `s3:`."""
    if re.match(r"\w+:/", str(folder)):
        return [f"{setting}={str(folder)!r} must be a folder that all nodes see"]
    return []
