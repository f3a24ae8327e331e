"""File systems without locks, hard links or directory fsync: all works, with one warning each."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.doctor import folders
from core.errors import InputError
from core.files import file_systems
from core.files.atomic import held, write_atomic
from core.files.file_systems import lacks, lock
from core.storage.store import FolderStore
from tests.harness import ENVIRONMENT, TAPIR

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static int there(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strncmp(path, getenv("ODD"), strlen(getenv("ODD"))) == 0;
}
static int refuse(void) { errno = atoi(getenv("ODD_ERRNO")); return -1; }
int flock(int fd, int how) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return there(fd) ? refuse() : real(fd, how);
}
int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    struct stat status;
    fstat(fd, &status);
    return S_ISDIR(status.st_mode) && there(fd) ? refuse() : real(fd);
}
int link(const char *a, const char *b) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "link");
    return strncmp(b, getenv("ODD"), strlen(getenv("ODD"))) ? real(a, b) : refuse();
}
int linkat(int f, const char *a, int g, const char *b, int flags) {
    int (*real)(int, const char *, int, const char *, int) = dlsym(RTLD_NEXT, "linkat");
    return strncmp(b, getenv("ODD"), strlen(getenv("ODD"))) ? real(f, a, g, b, flags) : refuse();
}
"""
"""Refuses in one folder what its file system is to lack."""


LACKS = ["hard links", "locks", "sync of folders"]


@pytest.fixture(params=[errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EINVAL])
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every file system lacks all three features."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    sync = os.fsync

    def sync_files(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            refuse()
        sync(handle)

    monkeypatch.setattr(file_systems, "_told", set())
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", sync_files)
    yield


def test_a_folder_has_one_owner_and_a_name_one_writer(bare: None, tmp_path: Path) -> None:
    with (
        held(tmp_path / "run", "run"),
        pytest.raises(InputError, match="another run is working"),
        held(tmp_path / "run", "run"),
    ):
        pass
    with held(tmp_path / "run", "run"):
        pass
    store = FolderStore(tmp_path / "store")

    def work(worker: int) -> int:
        bodies = [f"{worker} {i}".encode() for i in range(20)]
        won = [store.put(f"a/{i}", body, if_absent=True) for i, body in enumerate(bodies)]
        assert all(store.get(f"a/{i}") == bodies[i] for i, mine in enumerate(won) if mine)
        return sum(won)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == 20
    assert len(store.names()) == 20
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [".lock-names", "a"]


def test_each_lack_is_named_once(
    bare: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.log.LOG.propagate", True)
    for i in range(3):
        with held(tmp_path, "run"):
            write_atomic(tmp_path / "x", b"1")
            FolderStore(tmp_path).put(f"y{i}", b"1", if_absent=True)
    warnings = [record.getMessage().partition("has no ")[2] for record in caplog.records]
    assert sorted(text.partition(" (")[0] for text in warnings) == LACKS


def test_doctor_names_what_is_lacking(bare: None, tmp_path: Path) -> None:
    missing = lacks(tmp_path)
    assert sorted(missing) == LACKS
    row = folders.run_folder_findings(tmp_path, 0)[1]
    assert row.status == "warning" and "no locks, no hard links, no sync of folders" in row.observed
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_nothing_on_a_sound_disk(tmp_path: Path) -> None:
    assert folders.run_folder_findings(tmp_path, 0)[1].status == "ok"


def test_a_case_insensitive_file_system_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path.with_name(path.name.lower())))
    assert lacks(tmp_path) == ["names that differ in case alone"]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_an_io_error_is_not_taken_for_a_missing_feature(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    for name in ("link", "fsync"):
        monkeypatch.setattr(os, name, fails)
    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match=os.strerror(error)):
        file_systems.sync_folder(tmp_path)
    with pytest.raises(OSError, match=os.strerror(error)):
        file_systems.rename_if_absent(tmp_path / "a", tmp_path / "b", tmp_path)
    with pytest.raises(InputError, match=os.strerror(error)), held(tmp_path, "run"):
        pass


def test_an_owner_that_died_is_followed_and_one_elsewhere_is_not(
    bare: None, tmp_path: Path
) -> None:
    path, owner = tmp_path / ".lock", tmp_path / ".lock-owner"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    began = file_systems._began(dead.pid)
    dead.wait()
    here = os.uname().nodename
    for text, mine in (
        (f"{here} {dead.pid} {began}", True),
        (f"{here} {os.getpid()} 1", True),  # the process id was reused
        (f"{here} {os.getpid()} {file_systems._began(os.getpid())}", False),
        (f"elsewhere {dead.pid} {began}", False),
        ("", False),  # it is being written
    ):
        owner.write_text(text)
        with lock(path) as taken:
            assert taken == mine, text
        assert owner.exists() != mine
    assert not (tmp_path / ".lock-owner-old").exists()


@pytest.mark.seconds
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler: apt install gcc")
def test_a_job_runs_where_the_kernel_refuses_all_three(tmp_path: Path) -> None:
    odd, library = tmp_path / "odd", tmp_path / "odd.so"
    odd.mkdir()
    (tmp_path / "odd.c").write_text(SHIM)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "odd.c"), "-ldl"], check=True
    )
    extra = {"LD_PRELOAD": str(library), "ODD": str(odd), "ODD_ERRNO": str(errno.EOPNOTSUPP)}
    flags = ["--count=30", "--validation=0.3", "--block=4", "--json"]
    done = subprocess.run(
        [*TAPIR, "pack", "shapes", str(odd / "raw"), *flags],
        env={**ENVIRONMENT, **extra},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["train"] + counts["validation"] == 30
    assert "no sync of folders (Operation not supported)" in done.stderr
