"""Write a safetensors file of fp32 tensors with only one of them in memory at a time."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from checkpoint.writer import bytes_of

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]
"""Tensor name -> tensor."""


def file_parts(
    shapes: Shapes, read: Read, metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes that `safetensors.torch.save` would write: header, then tensors.

    The bytes must be equal, because tokens and priors refer to a dVAE by its file's digest.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        place = [at, at + size]
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": place}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(shapes):
        yield bytes_of(read(name).float())
