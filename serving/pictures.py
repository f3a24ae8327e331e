"""Finished pictures for their URLs, in memory and bounded; imports no torch."""

import secrets
from collections import OrderedDict

import cv2

from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import decode_rgb


class Pictures:
    """The newest pictures by names that cannot be guessed, which is why they need no token."""

    def __init__(self, most: int) -> None:
        """`most` pictures are kept; older ones are forgotten."""
        self._most = most
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def add(self, png: bytes) -> str:
        """Keep a picture; returns its name."""
        name = secrets.token_urlsafe(18)
        self._kept[name] = png
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """A picture, if it is still kept."""
        return self._kept.get(name)


def enlarged(png: bytes, side: int) -> bytes:
    """A square picture at another size."""
    picture = decode_rgb(png, "picture")
    how = cv2.INTER_CUBIC if side > len(picture) else cv2.INTER_AREA
    return encode_png(cv2.resize(picture, (side, side), interpolation=how))
