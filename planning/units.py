"""Bytes as people read them; imports no torch."""

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


def unit_of(count: float) -> tuple[float, str]:
    """The largest unit of which there is one at least, with its bytes."""
    return next(((size, name) for size, name in _UNITS if count >= size), (1e3, "kB"))


def memory_unit(most: float) -> tuple[float, str]:
    """The unit of a table of memory whose largest figure this is: GB, or MB for small models."""
    return min(unit_of(most), (1e9, "GB"))


def size_text(count: float) -> str:
    """Bytes in a unit in which they are no 0.0."""
    size, name = unit_of(count)
    return f"{count / size:,.1f} {name}"
