"""GPUs of this machine and their error counters, without torch."""

import importlib.metadata
import re
import shutil

from cluster.doctor.finding import Finding, bad, ok, warning
from cluster.doctor.programs import ask
from core.gpus import gpu_devices

_FIELDS = (
    "index",
    "name",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)
_QUERY = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([^)]*)\): (\d+)")
_SECONDS = 10.0


def gpu_findings(need: int) -> list[Finding]:
    """Check the number of GPUs, their error counters, and torch's build."""
    devices = gpu_devices()
    text = f"{len(devices)} GPUs on this machine"
    if len(devices) < need:
        fix = "see nvidia-smi and dmesg; ask the scheduler for GPUs (--gres=gpu:N, nvidia.com/gpu)"
        return [bad("gpus", f"{text}; {need} are needed", fix), *_build(devices)]
    if not devices:
        return [ok("gpus", f"{text}: this is a CPU machine")]
    return [ok("gpus", text), *_build(devices), *_counters()]


def _build(devices: list[str]) -> list[Finding]:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return []  # reported by the package check
    if devices and version.endswith("+cpu"):
        fix = "pip install torch from the index of the driver's CUDA version (see nvidia-smi)"
        return [
            bad("torch build", f"torch {version} is a CPU build, but this machine has GPUs", fix)
        ]
    return [ok("torch build", f"torch {version} for {len(devices)} GPUs")]


def _counters() -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        fix = "install the driver's nvidia-smi here, or pass it into the container"
        return [warning("gpu errors", "there is no nvidia-smi to ask", fix)]
    answer = ask(_QUERY, _SECONDS)
    if answer.problem:
        fix = "reset or reboot the node; look into dmesg for Xid errors"
        return [bad("gpu errors", f"nvidia-smi: {answer.problem}", fix)]
    kernel = ask(["dmesg"], _SECONDS)
    return [*counter_rows(answer.text), *xid_rows(kernel.text)]


def counter_rows(text: str) -> list[Finding]:
    """Rows from nvidia-smi's table: uncorrected ECC errors and slowdowns by heat or hardware."""
    rows = []
    table = [[word.strip() for word in line.split(",")] for line in text.splitlines() if line]
    for index, name, errors, slowed, hot in table:
        if errors.isdigit() and int(errors):
            problem = f"GPU {index} ({name}) has {errors} uncorrected ECC errors"
            rows.append(
                bad("gpu errors", problem, "drain the node; nvidia-smi -r, then dcgmi diag")
            )
        if "Active" in (slowed, hot):
            reason = "heat" if hot == "Active" else "hardware (power brake or other)"
            problem = f"GPU {index} ({name}) is slowed down by {reason}"
            rows.append(warning("gpu errors", problem, "look at cooling and power of the node"))
    return rows or [ok("gpu errors", f"no errors on {len(table)} GPUs")]


def xid_rows(text: str) -> list[Finding]:
    """Rows from the kernel's log: Xid errors of the driver, each kind once."""
    counts: dict[tuple[str, str], int] = {}
    for device, number in _XID.findall(text):
        counts[device, number] = counts.get((device, number), 0) + 1
    fix = "see NVIDIA's list of Xid errors; drain the node if the error returns after a reset"
    return [
        warning("gpu errors", f"Xid {number} of {device}, {count} times", fix)
        for (device, number), count in counts.items()
    ]
