"""One object of a store's listing."""

from typing import NamedTuple


class Entry(NamedTuple):
    """An object of a listing."""

    name: str
    size: int
    tag: str
    """Changes with the content: an ETag, or the time of a file."""
