"""How long collectives take: rings over the slowest link that a group crosses."""

import math

from parallel.config import MeshConfig
from planning.estimate.hardware import Hardware


def group_span(mesh: MeshConfig, group: str) -> tuple[int, int]:
    """(ranks of a group, stride between neighbours in global ranks), as in parallel/mesh.py."""
    return {
        "tensor": (mesh.tensor, 1),
        "machine": (mesh.local, mesh.tensor),
        "between": (mesh.nodes, mesh.local * mesh.tensor),
        "data": (mesh.data, mesh.tensor),
        "pipeline": (mesh.pipeline, mesh.data * mesh.tensor),
        "ends": (min(2, mesh.pipeline), (mesh.pipeline - 1) * mesh.data * mesh.tensor),
        "world": (mesh.world, 1),
    }[group]


def ring(size: int, stride: int, hardware: Hardware) -> tuple[float, float]:
    """(bytes per second, seconds per hop) of a ring over `size` ranks, `stride` apart.

    Across nodes, all groups that leave a node share its network: `stride` of them, at most one per
    processor.
    """
    if size * stride <= hardware.gpus_per_node:
        return hardware.link * hardware.joined, hardware.link_latency
    sharing = min(stride, hardware.gpus_per_node)
    rate = min(hardware.link, hardware.network / sharing) * hardware.joined
    return rate, hardware.network_latency


def all_reduce(count: float, span: tuple[int, int], hardware: Hardware) -> float:
    """Seconds of an all-reduce of `count` bytes on each rank."""
    return 2 * gather(count, span, hardware)


def gather(count: float, span: tuple[int, int], hardware: Hardware) -> float:
    """Seconds of an all-gather or reduce-scatter whose larger side has `count` bytes."""
    size, stride = span
    if size == 1:
        return 0.0
    rate, latency = ring(size, stride, hardware)
    hops = size - 1 if hardware.rings else math.ceil(math.log2(size))
    return (size - 1) / size * count / rate + hops * latency


def hand_on(count: float, mesh: MeshConfig, hardware: Hardware) -> float:
    """Seconds to send `count` bytes to the next stage while all ranks of a node send."""
    _, stride = group_span(mesh, "pipeline")
    if mesh.pipeline * stride <= hardware.gpus_per_node:
        return count / (hardware.link * hardware.joined) + hardware.link_latency
    sharing = min(stride, hardware.gpus_per_node)
    rate = min(hardware.link, hardware.network / sharing) * hardware.joined
    return count / rate + hardware.network_latency
