"""Temporary folders of one process, in which sockets and locks work whatever TMPDIR is."""

import fcntl
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from core.errors import TapirError
from core.log import LOG

_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_LONGEST = 107
"""Maximum bytes of a socket's path (Linux)."""
_SOCKET = "pymp-xxxxxxxx/listener-xxxxxxxx"
"""Longest socket name that multiprocessing or Tapir uses."""
_NO_URL = r"[#?\t\r\n]"
"""torch parses a file store's address as a URL and cuts it at these characters."""
_told: set[str] = set()


def private_folder(purpose: str) -> Path:
    """Make a temporary folder for this process, and delete those of dead processes.

    It is in TMPDIR if sockets and locks work there, else in a folder with a short path.
    Raises: TapirError if they work nowhere.
    """
    _tell_of_another_tmpdir()
    refused = []
    for root in _roots():
        for path in _folders(root, purpose):
            if not _owner_lives(path):
                shutil.rmtree(path, ignore_errors=True)
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-{os.getpid()}-", dir=root))
        except OSError as error:
            refused.append(f"{root} ({error.strerror})")
            continue
        if not (reason := _refusal(folder)):
            return folder
        folder.rmdir()
        refused.append(f"{root} ({reason})")
    raise TapirError(
        f"no folder can hold sockets and locks: {', '.join(refused)}; export TMPDIR=<a short path "
        "on a local disk>"
    )


def left_folders(purpose: str) -> Iterator[Path]:
    """Private folders of dead processes."""
    for root in _roots():
        yield from (path for path in _folders(root, purpose) if not _owner_lives(path))


def _folders(root: Path, purpose: str) -> list[Path]:
    return [path for path in root.glob(f"{purpose}-*-*") if _owner(path).isdigit()]


def _owner(path: Path) -> str:
    return path.name.rsplit("-", 2)[1]


def _owner_lives(path: Path) -> bool:
    return Path(f"/proc/{_owner(path)}").exists()


def _roots() -> list[Path]:
    """Candidate parents of temporary folders, preferred first."""
    named = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *_SHORT]
    return [Path(path) for path in dict.fromkeys(named) if path]


def _refusal(folder: Path) -> str:
    """Why a folder cannot hold sockets, locks and the ranks' file store; empty if it can."""
    if len(os.fsencode(folder / _SOCKET)) > _LONGEST:
        return "its path is too long for sockets"
    if re.search(_NO_URL, str(folder)):
        return "#, ? or a line break in its path"
    probe = folder / secrets.token_hex(4)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(probe))
        probe.unlink()
        with open(probe, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b"lock")
    except OSError as error:
        return f"no sockets or locks there: {error.strerror or error}"
    finally:
        probe.unlink(missing_ok=True)
    return ""


def _tell_of_another_tmpdir() -> None:
    """Warn if TMPDIR is not writable: Python then silently uses another folder."""
    named, used = os.environ.get("TMPDIR", ""), tempfile.gettempdir()
    if named and Path(named).absolute() != Path(used).absolute() and named not in _told:
        _told.add(named)
        LOG.warning("TMPDIR=%s cannot be written: temporary files go to %s", named, used)
