"""One raw image-caption pair, the unit that every source yields."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An encoded image with its caption."""

    key: str
    """Unique name within the data set; the members of a shard are KEY.png, KEY.txt, KEY.json."""
    image: bytes
    """The encoded image, as it will be stored."""
    extension: str
    """png, jpg or webp: how the image is encoded."""
    caption: bytes
    """The caption's bytes; `pack` checks that they are UTF-8."""
    split_key: str
    """Pairs with the same split_key land in the same split (by default the key itself)."""
    where: str
    """Where it came from, for error messages."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """What a source found and cannot give as a pair; nothing is passed over in silence."""

    key: str
    kind: str
    """IGNORED, or what is wrong: file, caption, image, archive, row."""
    reason: str


IGNORED = "ignored"
"""Other files among the pairs; they are counted, and never stop a job."""
EXTENSIONS_OF_NOTES = ("json", "parquet", "tsv", "csv")
"""What downloaders leave beside their pairs."""
