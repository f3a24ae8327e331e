"""Fallbacks for file systems without locks, hard links or fsync of folders.

Each missing feature is logged once; `lacks` probes all of them for `tapir doctor`.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from core.log import LOG

LOCK = ".lock"
_NOT_SUPPORTED = (
    *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM),
    *(errno.ENOLCK, errno.EBADF, errno.EMLINK, errno.EXDEV, errno.ENOTTY),
)
RENAME = "renaming over a file"
_OWNER = "-owner"
_PATIENCE, _AGAIN = 60.0, 0.02
_told: set[str] = set()


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file while the context lasts; yields False if another process holds it.

    Where flock is not supported, a second file that names the holding process is the lock; it is
    taken over if that process was on this machine and has died.
    Raises: OSError if the file cannot be made, or others hold it for a minute.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            _tell("locks", path, error, f"{path.name}{_OWNER} takes their place")
        else:
            yield True
            return
    owner = path.with_name(path.name + _OWNER)
    taken = _wait_for(owner) if wait else _take(owner)
    try:
        yield taken
    finally:
        if taken:
            owner.unlink(missing_ok=True)


def rename_if_absent(source: Path, target: Path, root: Path) -> bool:
    """Rename a file unless the target exists; returns False if it does.

    Uses a hard link, which is atomic without a lock; else a lock in `root`.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _tell("hard links", root, error, "a lock takes their place")
    else:
        return True
    with lock(root / f"{LOCK}-names", wait=True):
        if target.exists():
            return False
        os.replace(source, target)
        return True


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that its names survive a power loss; a no-op where not supported."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # writable, but not readable
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _tell("sync of folders", folder, error, "after a loss of power the last files may be gone")
    finally:
        os.close(handle)


def lacks(folder: Path) -> list[str]:
    """List the features that a folder's file system lacks; probes with temporary files.

    Raises: OSError if nothing can be written there.
    """
    with TemporaryDirectory(dir=folder, prefix=".tapir-doctor-") as name:
        one, two = Path(name, "one"), Path(name, "two")
        one.touch()
        missing = [what for what, act in _acts(one, two).items() if _fails(act)]
        if Path(name, "ONE").exists():
            missing.append("names that differ in case alone")
    return missing


def _acts(one: Path, two: Path) -> dict[str, Callable[[], object]]:
    def flock() -> None:
        with open(one) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def sync() -> None:
        handle = os.open(one.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename() -> None:
        two.touch()
        os.replace(two, one)

    acts = {"locks": flock, "hard links": lambda: os.link(one, two), "sync of folders": sync}
    return {**acts, RENAME: rename}


def _fails(act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError:
        return True
    return False


def _wait_for(owner: Path) -> bool:
    until = time.monotonic() + _PATIENCE
    while not _take(owner):
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, "held by another process", str(owner))
        time.sleep(_AGAIN)
    return True


def _take(owner: Path) -> bool:
    """Create the owner file, or replace that of a dead process."""
    if _make(owner, _me()):
        return True
    before = _read(owner)
    if not _has_died(before):
        return False
    aside = owner.with_name(owner.name + "-old")
    if not _make(aside, _me()):  # one process at a time may replace a stale owner
        return False
    try:
        if _read(owner) == before:
            owner.unlink(missing_ok=True)
            return _make(owner, _me())
        return False
    finally:
        aside.unlink(missing_ok=True)


def _make(path: Path, text: str) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(handle, "w") as file:
        file.write(text)
    return True


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def _me() -> str:
    return f"{socket.gethostname()} {os.getpid()} {_began(os.getpid())}"


def _has_died(owner: str) -> bool:
    """True if an owner was a process of this machine that no longer runs."""
    words = owner.rsplit(" ", 2)
    if len(words) != 3 or words[0] != socket.gethostname() or not words[1].isdigit():
        return False
    return _began(int(words[1])) != words[2]


def _began(pid: int) -> str:
    """Start time of a process (Linux): a later process with the same pid has another one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "gone"


def _tell(what: str, where: Path, error: OSError, so: str) -> None:
    if what not in _told:
        _told.add(what)
        LOG.warning("%s: its file system has no %s (%s): %s", where, what, error.strerror, so)
