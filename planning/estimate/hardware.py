"""Processors and clusters by their physical constants; imports no torch.

Peaks, memory and links are from data sheets. `sustained` and `streamed` are the fractions of
them that large kernels reach: power and operand loads limit tensor cores, refresh and turnarounds
limit memory. They were lowered once, from 0.85 to 0.8, since all published runs
(planning/estimate/published.py) were predicted 12% too fast.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from core.config import wrong_types
from core.errors import InputError

GB = 1e9
MEASURED = ("half_flops", "full_flops", "bandwidth", "link", "overhead", "sustained")
"""Fields that every calibration must hold."""
_MOST = 1e30
"""Constants below it can be multiplied without overflow."""
_SHARES = ("sustained", "streamed", "joined", "together")
_POSITIVE = (
    "half_flops",
    "full_flops",
    "memory",
    "host_memory",
    "bandwidth",
    "units",
    "link",
    "gpus_per_node",
    "network",
)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of processor, and how a cluster joins them."""

    name: str
    half_flops: float
    """Peak of 16-bit matmuls with fp32 accumulation, in operations per second."""
    full_flops: float
    """Peak of fp32 matmuls."""
    bf16: bool = True
    """False without bf16 units: 16 bits mean fp16 then."""
    memory: float
    """Bytes per processor."""
    context: float = 0.6 * GB
    """Bytes of it that a process' context takes: 0.3 GB of the driver and of lazily loaded kernels
    (pytorch issue 107667; 0.2 to 0.7 with older ones, issue 28113), and the workspaces of matmuls.
    NCCL's buffers are counted apart: planning/estimate/reserve.py."""
    channels: int = 24
    """Channels of an NCCL communicator inside a node: 24 on A100s with NVSwitch (NVIDIA/nccl
    issue 578); 0 = no NCCL."""
    host_memory: float
    """Bytes of host memory per node."""
    host_cores: int = 0
    """Cores of a node's host (not hyperthreads), which decode pictures beside its ranks."""
    bandwidth: float
    """Bytes per second of memory."""
    units: int
    """Multiprocessors: a matmul's tiles run in waves of this many."""
    link: float
    """Bytes per second that a processor sends to its neighbours inside a node."""
    link_latency: float = 8e-6
    """Seconds of one hop inside a node, with its kernel."""
    gpus_per_node: int = 8
    """Processors per node."""
    network: float
    """Bytes per second that a node sends to the others."""
    network_latency: float = 15e-6
    """Seconds of one hop between nodes."""
    launch: float = 4e-6
    """Seconds between two dependent kernels."""
    sustained: float = 0.8
    """Fraction of the peak that whole waves of tiles reach."""
    streamed: float = 0.8
    """Fraction of the bandwidth that elementwise kernels reach."""
    joined: float = 0.8
    """Fraction of a link that a ring of collectives reaches."""
    rings: bool = False
    """True if small collectives use a ring, too (gloo); NCCL uses trees, which have fewer hops."""
    overhead: float = 0.0
    """Seconds outside of kernels per layer and micro-batch (Python, on CPUs)."""
    step_overhead: float = 0.01
    """Seconds outside of kernels per step."""
    engine_overhead: float = 0.0
    """Additional seconds per step of DeepSpeed's engines."""
    cores: int = 0
    """Cores that all ranks of a node share; 0 = every rank has a processor of its own."""
    together: float = 1.0
    """Fraction of its rate that a core keeps while all others work."""
    cost_per_hour: float = 0.0
    """Dollars per processor and hour, of public clouds on demand; 0 = unknown."""

    def problems(self) -> list[str]:
        """Every value that no processor or cluster can have."""
        problems = []
        for name, value in vars(self).items():
            if not isinstance(value, float | int):
                continue
            if name in _SHARES and not 0 < value <= 1:
                problems.append(f"{name}={value} is a fraction; it must be above 0 and at most 1")
            elif name in _POSITIVE and not 0 < value < _MOST:
                problems.append(f"{name}={value} must be a positive finite number")
            elif not 0 <= value < _MOST:
                problems.append(f"{name}={value} must be a finite number and not negative")
        if not problems and self.usable <= 0:
            problems.append(
                f"memory of {self.memory / GB:g} GB leaves nothing: {self.context / GB:g} GB are "
                "the driver's and the libraries'"
            )
        return problems

    def with_constants(self, constants: Mapping[str, float]) -> "Hardware":
        """The hardware with these constants, by field, in place of its own."""
        return replace(self, **{**vars(self), **constants})

    def crowd(self, ranks: int) -> float:
        """Slow-down of a rank while `ranks` ranks compute on the same machine."""
        if not self.cores or ranks < 2:
            return 1.0
        others = min(1.0, (ranks - 1) / max(self.cores - 1, 1))
        return max(1.0, ranks / self.cores) / (1 - others * (1 - self.together))

    @property
    def usable(self) -> float:
        """Bytes that a rank may fill."""
        return self.memory - self.context


GIB = 2**30


def _a100(memory: float, bandwidth: float, cost: float) -> Hardware:
    return Hardware(
        name=f"a100-{memory:.0f}gb",
        half_flops=312e12,
        full_flops=19.5e12,
        memory=memory * GB,
        bandwidth=bandwidth,
        units=108,
        host_memory=1152 * GIB,  # AWS p4d and p4de
        host_cores=48,
        link=300 * GB,
        network=200 * GB,
        cost_per_hour=cost,
    )


def _v100(memory: float, host: int, cores: int) -> Hardware:
    return Hardware(
        name=f"v100-{memory:.0f}gb",
        half_flops=125e12,
        full_flops=15.7e12,
        bf16=False,
        memory=memory * GB,
        bandwidth=900 * GB,
        units=80,
        channels=12,  # six links, each in both directions
        host_memory=host * GIB,
        host_cores=cores,
        link=150 * GB,
        network=12.5 * GB,
        cost_per_hour=2.5,
    )


_H100 = Hardware(
    name="h100",
    half_flops=989e12,
    full_flops=67e12,
    memory=80 * GB,
    bandwidth=3350 * GB,
    units=132,
    host_memory=2048 * GIB,  # AWS p5
    host_cores=96,
    link=450 * GB,
    network=400 * GB,
    sustained=0.7,
    cost_per_hour=4.0,
)
"""SXM; 700 W do not feed all tensor cores at full clock, so they reach a smaller share."""

_H100_500W = replace(
    _H100,
    name="h100-500w",
    memory=96 * GB,
    bandwidth=2400 * GB,
    sustained=0.52,
    host_memory=2048 * GIB,
)
"""Meta's Grand Teton: HBM2e, and 500 W of 700: tensor cores' rate falls as their power does."""

_CPU = Hardware(
    name="cpu",
    half_flops=200e9,
    full_flops=90e9,
    memory=24 * GB,
    context=0.5 * GB,
    channels=0,
    host_memory=24 * GB,
    bandwidth=15 * GB,
    units=1,
    link=1.0 * GB,
    link_latency=2e-4,
    gpus_per_node=1024,
    network=1.0 * GB,
    network_latency=2e-4,
    launch=5e-6,
    cores=2,
    joined=1.0,
    rings=True,
)
"""One rank per core of this machine; `tapir plan --calibrate` measures it."""

KNOWN = {
    row.name: row
    for row in (
        _v100(16, 488, 32),  # AWS p3 and p3dn
        _v100(32, 768, 48),
        _a100(40, 1555 * GB, 3.0),
        _a100(80, 2039 * GB, 3.7),
        _H100,
        _H100_500W,
        _CPU,
    )
}
SHORT = {"v100": "v100-16gb", "a100": "a100-80gb"}


def hardware_of(name: str, calibration: Path | None = None) -> Hardware:
    """The hardware of that name, with constants of a calibration file in place of data sheets'.

    Raises: InputError for an unknown name, or with every problem of the file.
    """
    hardware = KNOWN.get(SHORT.get(name, name))
    if hardware is None:
        raise InputError(f"there is no hardware {name!r} (known: {', '.join([*SHORT, *KNOWN])})")
    return hardware if calibration is None else _measured(hardware, calibration)


def _measured(hardware: Hardware, calibration: Path) -> Hardware:
    remedy = f"make one with tapir plan --calibrate {calibration}"
    try:
        measured = json.loads(calibration.read_bytes())
    except ValueError:
        measured = None
    if not isinstance(measured, dict):
        raise InputError(f"{calibration} is not a calibration; {remedy}")
    missing = [f"{name} is missing" for name in MEASURED if name not in measured]
    wrong = wrong_types(Hardware, measured, "")
    wrong = wrong or replace(hardware, **measured).problems() or missing
    if wrong:
        raise InputError(f"{calibration} is not a calibration: {'; '.join(wrong)}; {remedy}")
    return replace(hardware, **measured)
