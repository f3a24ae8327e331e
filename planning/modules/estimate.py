"""Memory and time of a module's training step on a mesh."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.memory import size_text
from planning.estimate.hardware import Hardware
from planning.estimate.kernels import flops, seconds
from planning.estimate.overlapped.rates import steady
from planning.estimate.overlapped.sharded import AHEAD, Unit, ring_seconds, sharded_step
from planning.modules.record import Build, Recorded, record

UNITS = 8
"""Parts that a module is cut into for the overlap of its collectives with its passes."""


@dataclass(frozen=True, kw_only=True)
class DataMesh:
    """Replicas of a module, and how many of them share its weights."""

    data: int = 1
    shards: int = 1
    """1: each replica has the whole module (DDP); above: FSDP in groups of this many."""

    def problems(self) -> list[str]:
        """Sizes that give no mesh."""
        if min(self.data, self.shards) < 1 or self.data % self.shards:
            return [
                f"--mesh data={self.data},shards={self.shards}: shards must divide data, and both "
                "must be at least 1"
            ]
        return []


def mesh_of(text: str, world: int) -> DataMesh:
    """The mesh of `data=64,shards=8`; without it, `world` replicas.

    Raises: InputError for other names, or values that are no numbers.
    """
    sizes = {"data": max(world, 1)}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in ("data", "shards") or not value.isdigit():
            raise InputError(
                f"--mesh {text}: {part!r} is not data=N or shards=N; for example data=64,shards=8"
            )
        sizes[name] = int(value)
    return DataMesh(**sizes)


@dataclass(frozen=True, kw_only=True)
class ModuleEstimate:
    """What a step takes on one rank."""

    mesh: DataMesh
    parameters: int
    """Trained elements of the whole module."""
    bytes_: dict[str, int]
    seconds: float
    exposed: float
    """Seconds of collectives that nothing hides."""
    mfu: float

    @property
    def peak(self) -> int:
        """Bytes of a rank at the peak."""
        return sum(self.bytes_.values())

    def json(self) -> dict[str, Any]:
        return {
            "mesh": vars(self.mesh),
            "trained_parameters": self.parameters,
            "bytes": self.bytes_,
            "peak_bytes": self.peak,
            "step_seconds": self.seconds,
            "exposed_communication_seconds": self.exposed,
            "mfu": self.mfu,
        }

    def text(self, hardware: Hardware) -> str:
        """Two sentences and a verdict."""
        parts = ", ".join(f"{name} {size_text(count)}" for name, count in self.bytes_.items())
        fits = "it fits" if self.fits(hardware) else "it does not fit"
        usable, peak = size_text(int(hardware.usable)), size_text(self.peak)
        return (
            f"{self.parameters:,} trained parameters on {self.mesh.data} x {hardware.name} (shards "
            f"of {self.mesh.shards}): {peak} a rank at the peak ({parts}); {usable} can be used: "
            f"{fits}.\nA step takes {self.seconds:.3g} s, of which {self.exposed:.3g} s of "
            f"communication are exposed; MFU {self.mfu:.1%}."
        )

    def fits(self, hardware: Hardware) -> bool:
        """True if a rank's memory holds the peak."""
        return self.peak <= hardware.usable


def estimate_module(target: str, mesh: DataMesh, hardware: Hardware, half: bool) -> ModuleEstimate:
    """Estimate `FILE.py:build`, whose function gives a module and the batch of one rank.

    Raises: InputError if the file or the function is missing, or if its step needs values.
    """
    build = load(target)
    try:
        done = record(build, half)
    except Exception as error:
        raise InputError(
            f"{target}: a step without values failed: {type(error).__name__}: {error}; the build "
            "function must return (module, batch), whose forward pass reads no values"
        ) from error
    return estimate_recorded(done, mesh, hardware, half)


def load(target: str) -> Build:
    """The function named by `FILE.py:function`."""
    name, _, function = target.rpartition(":")
    path = Path(name)
    if not function or not path.is_file():
        raise InputError(f"--estimate {target}: give FILE.py:function, and a file that exists")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"--estimate {target}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build: Build | None = getattr(module, function, None)
    if not callable(build):
        raise InputError(f"--estimate {target}: {path} has no function {function!r}")
    return build


def estimate_recorded(
    done: Recorded, mesh: DataMesh, hardware: Hardware, half: bool
) -> ModuleEstimate:
    """The rank's bytes and seconds, from a step of the whole module."""
    held = steady(hardware)
    states = {
        "parameters": done.parameters,
        "gradients": done.gradients,
        "optimizer": done.moments,
    }
    bytes_ = {name: -(-count // mesh.shards) for name, count in states.items()}
    bytes_["activations"] = max(done.peak - sum(states.values()), 0)
    size = 2 if half else 4
    if mesh.shards > 1:  # gathered units, and a unit's gradients
        bytes_["buffers"] = (AHEAD + 1) * done.largest * size // 4
    elif mesh.data > 1:  # DDP's buckets
        bytes_["buffers"] = done.gradients
    each = size * done.elements / UNITS
    unit = Unit(
        forward=seconds(done.forward, held) / UNITS,
        backward=seconds(done.backward, held) / UNITS,
        gather=ring_seconds(each, mesh.shards, held),
        scatter=_reduced(each, mesh, held),
        between=_between(each, mesh, held),
    )
    played = sharded_step(
        [unit] * UNITS,
        1,
        keeps=mesh.shards == 1,
        update=seconds(done.update, held) / mesh.shards,
        hardware=held,
    )
    total = played.seconds + held.step_overhead
    work = flops(done.forward) + flops(done.backward)
    return ModuleEstimate(
        mesh=mesh,
        parameters=done.elements,
        bytes_=bytes_,
        seconds=total,
        exposed=played.waited,
        mfu=work / total / hardware.half_flops,
    )


def _reduced(count: float, mesh: DataMesh, hardware: Hardware) -> float:
    """Gradients over a group of shards, or over all replicas if none share weights."""
    if mesh.shards > 1:
        return ring_seconds(count, mesh.shards, hardware)
    return 2 * ring_seconds(count, mesh.data, hardware)


def _between(count: float, mesh: DataMesh, hardware: Hardware) -> float:
    """A shard's gradients over the groups."""
    groups = mesh.data // mesh.shards
    if mesh.shards == 1 or groups == 1:
        return 0.0
    return 2 * ring_seconds(count / mesh.shards, groups, hardware, mesh.shards)
