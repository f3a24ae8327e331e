"""Keep memory that was freed in the process, instead of giving it back page by page."""

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Names of glibc's mallopt, from malloc.h."""
_LARGEST = 2**31 - 1
_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; returns False where there is no glibc.

    On CPUs torch allocates every tensor anew. By default a large one is mapped, filled page fault
    by page fault, and unmapped again; kept memory is simply used again. The process stays as
    large as it ever was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((MMAP_MAX, 0), (TRIM_THRESHOLD, _LARGEST), (TOP_PAD, _PAD))
    taken = [mallopt(name, value) for name, value in wanted]
    return all(taken)
