"""Free memory of this machine, and a glibc setting that keeps freed memory in the process."""

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
"""Of cgroup v2 and v1: limit, usage, and the reclaimable page cache in the usage."""


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(free, total) bytes, within the limits of the control group and of ulimit -v."""
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

    On CPUs torch allocates memory for every tensor. By default glibc maps and unmaps large blocks,
    so that each tensor costs page faults again; kept memory is reused. The process keeps its
    peak size.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = ((MMAP_MAX, 0), (TRIM_THRESHOLD, _LARGEST), (TOP_PAD, _PAD))
    taken = [mallopt(name, value) for name, value in options]
    return all(taken)


_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


def unit_of(count: float) -> tuple[float, str]:
    """The largest unit that is not above `count` bytes, as (bytes, name)."""
    return next(((size, name) for size, name in _UNITS if count >= size), (1e3, "kB"))


def memory_unit(most: float) -> tuple[float, str]:
    """The unit of a memory table with this largest figure: GB, or MB for small models."""
    return min(unit_of(most), (1e9, "GB"))


def size_text(count: float) -> str:
    """Format bytes in the largest unit that fits."""
    size, name = unit_of(count)
    return f"{count / size:,.1f} {name}"
