"""Free space and speed of the run folder, the temporary folder and shared memory."""

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.doctor.finding import GB, MB, Finding, bad, ok, warning
from core.errors import TapirError
from core.files.file_systems import RENAME, lacks
from core.files.temporary import private_folder

RUN_FOLDER = "run folder"
PROBE = ".tapir-doctor-"
PROBE_BYTES = 16_000_000
TEMPORARY_GB = 0.25
SLOW = 20.0
"""MB/s with fsync below which checkpoints take long."""
_SHARED = Path("/dev/shm")
_SHARED_BYTES = 1_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_folder_findings(out: Path, need: float) -> list[Finding]:
    """Check the run folder, or its nearest existing parent."""
    rows = _folder(RUN_FOLDER, existing(out), need, "or give another --out")
    return rows if rows[0].status == "bad" else [*rows, _file_system(existing(out))]


def _file_system(folder: Path) -> Finding:
    missing = lacks(folder)
    if not missing:
        return ok("file system", f"{folder}: locks, links, renames, case and sync as needed")
    text = f"{folder} has no {', no '.join(missing)}"
    if RENAME in missing:
        return bad("file system", text, "give an --out on another disk: nothing is safe there")
    fix = "let only one node work there, or give an --out on a disk that has them"
    return warning("file system", text, fix)


def temporary_findings() -> list[Finding]:
    """Check the folder in TMPDIR; Python silently uses another if it is full."""
    named = [os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    path = Path(next(iter(named), "/tmp"))
    return _folder("temporary folder", path, TEMPORARY_GB, "or export TMPDIR=<another folder>")


def socket_findings() -> list[Finding]:
    """Check the folder for the ranks' sockets: TMPDIR, or one with a short path."""
    try:
        folder = private_folder("tapir-doctor")
    except TapirError as error:
        return [bad("sockets", str(error), "export TMPDIR=/tmp, or mount a disk there")]
    folder.rmdir()
    return [ok("sockets", f"ranks of this machine meet in {folder.parent}")]


def shared_memory_findings(need: float) -> list[Finding]:
    """Check /dev/shm, which NCCL, loaders and semaphores of one node use."""
    fix = (
        "docker run --shm-size=8g; Kubernetes: an emptyDir of medium Memory at /dev/shm; else "
        "mount -o remount,size=50% /dev/shm"
    )
    try:
        space = os.statvfs(_SHARED)
        with _probe(_SHARED) as path:
            _write(path, _SHARED_BYTES)
    except OSError as error:
        return [bad("shared memory", f"/dev/shm cannot be used: {error.strerror}", fix)]
    free, whole = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    text = f"{free / GB:.2f} of {whole / GB:.2f} GB of /dev/shm are free"
    if free < need * GB:
        return [bad("shared memory", f"{text}; {need:g} are needed", fix)]
    return [ok("shared memory", text)]


def existing(path: Path) -> Path:
    """The folder, or its nearest existing parent."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _folder(check: str, path: Path, need: float, other: str) -> list[Finding]:
    """Check free space, then the speed of a synced write."""
    if not path.exists():
        return [bad(check, f"{path} does not exist", f"mkdir -p it {other}")]
    if not path.is_dir():
        return [bad(check, f"{path} is not a folder", f"remove the file {other}")]
    space = os.statvfs(path)
    free = space.f_bavail * space.f_frsize
    text = f"{path}: {free / GB:.2f} of {space.f_blocks * space.f_frsize / GB:.2f} GB are free"
    cleanup = f"delete what is not needed there, {other}"
    if free < need * GB:
        return [bad(check, f"{text}; {need:g} are needed", cleanup)]
    if space.f_files and space.f_favail == 0:
        return [bad(check, f"{path} has no free inode for another file", cleanup)]
    try:
        with _probe(path) as probe:
            seconds = _write(probe, PROBE_BYTES)
    except OSError as error:
        return [_refused(check, path, error, other)]
    speed = PROBE_BYTES / MB / seconds
    text = f"{text}, {speed:.0f} MB/s written and synced"
    if speed < SLOW:
        fix = f"checkpoints will take long there: use a faster disk, {other}"
        return [warning(check, text, fix)]
    return [ok(check, text)]


def _refused(check: str, path: Path, error: OSError, other: str) -> Finding:
    if error.errno in _FULL:
        how = f"free space or raise the quota there, {other}"
    elif error.errno == errno.EROFS:
        how = f"mount it for writing (the disk may have failed: see dmesg), {other}"
    elif error.errno == errno.EFBIG:
        how = f"ulimit -f unlimited, {other}"
    else:
        how = f"give this user the right to write there, {other}"
    return bad(check, f"{path} cannot be written: {error.strerror}", how)


@contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    path = folder / f"{PROBE}{uuid.uuid4().hex[:12]}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, size: int) -> float:
    """Seconds to write and sync random bytes, which cannot be compressed."""
    block = os.urandom(1_000_000)
    began = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began
