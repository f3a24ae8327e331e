"""The memory of this machine: how much is free, and keeping what was freed in the process."""

import ctypes
import os
import platform
import resource
from pathlib import Path

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Names of glibc's mallopt, from malloc.h."""
_LARGEST = 2**31 - 1
_PAD = 64 * 2**20
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Version 2 and 1: the limit, what is used, and the part of it that is files to be dropped."""


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes that are free, and all; limits of control group and process (ulimit -v) count."""
    table = _table(root / "proc/meminfo")
    free, whole = table["MemAvailable"] * 1024, table["MemTotal"] * 1024
    for limit, used, dropped in _CGROUPS:
        group = root / "sys/fs/cgroup"
        try:
            most, now = (int((group / name).read_text()) for name in (limit, used))
            files = _table((group / used).parent / "memory.stat").get(dropped, 0)
        except (OSError, ValueError):
            continue  # no such group here, or "max"
        free, whole = min(free, most - now + files), min(whole, most)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        pages = int((root / "proc/self/statm").read_text().split()[0])
        used_now = pages * os.sysconf("SC_PAGE_SIZE")
        free, whole = min(free, space - used_now), min(whole, space)
    return max(free, 0), whole


def _table(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; returns False where there is no glibc.

    On CPUs torch allocates every tensor anew. By default a large one is mapped, filled page fault
    by page fault, and unmapped again; kept memory is simply used again. The process stays as
    large as it ever was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = ((MMAP_MAX, 0), (TRIM_THRESHOLD, _LARGEST), (TOP_PAD, _PAD))
    taken = [mallopt(name, value) for name, value in options]
    return all(taken)


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
