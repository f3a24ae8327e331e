"""Kernel limits of a process: open files, locked memory, processes, core dumps."""

import resource
from pathlib import Path

from cluster.doctor.finding import MB, Finding, bad, ok, warning

GOOD_FILES = 4096
LEAST_PROCESSES, GOOD_PROCESSES = 512, 4096
LEAST_LOCKED = 2**20
"""Bytes; 64 kB is an old default, too little for RDMA and io_uring."""
_INFINIBAND = Path("/sys/class/infiniband")
_CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def limit_findings(files: int) -> list[Finding]:
    """One row for each limit."""
    return [_files(files), _locked(), _processes(), _cores()]


def _files(least: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_text(soft)} open files (hard limit {_text(hard)})"
    how = "in the job script, or nofile in /etc/security/limits.conf and LimitNOFILE of slurmd"
    if _below(soft, least):
        return bad("open files", f"{text}; {least} are needed", f"ulimit -n 65536 {how}")
    if _below(soft, GOOD_FILES):
        return warning("open files", f"{text}; large jobs need more", f"ulimit -n 65536 {how}")
    return ok("open files", text)


def _locked() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / MB:.2f} MB"
    text = f"{shown} of locked memory"
    fix = "ulimit -l unlimited in the job script; memlock in limits.conf, LimitMEMLOCK of slurmd"
    infiniband = _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())
    if infiniband and soft != resource.RLIM_INFINITY:
        return bad("locked memory", f"{text}, and there is InfiniBand", fix)
    if _below(soft, LEAST_LOCKED):
        return warning("locked memory", f"{text}: too little for RDMA and io_uring", fix)
    return ok("locked memory", text)


def _processes() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    text = f"{_text(soft)} processes and threads of this user"
    fix = "ulimit -u unlimited; nproc in limits.conf, TasksMax of slurmd, pids limit of the pod"
    if _below(soft, LEAST_PROCESSES):
        return bad("processes", text, fix)
    if _below(soft, GOOD_PROCESSES):
        return warning("processes", text, fix)
    return ok("processes", text)


def _cores() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = _CORE_PATTERN.read_text().strip() if _CORE_PATTERN.exists() else ""
    piped = pattern.startswith("|")
    text = f"core dumps up to {_text(soft)} bytes, to {pattern.split()[0] if pattern else '?'}"
    if soft == 0 or piped:
        return ok("core dumps", text)
    return warning("core dumps", f"{text}: each holds a whole rank's memory", "ulimit -c 0")


def _below(value: int, least: int) -> bool:
    return value != resource.RLIM_INFINITY and value < least


def _text(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
