"""How long matmuls and elementwise kernels take, from the hardware's constants and their sizes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from planning.estimate.hardware import Hardware

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64))
"""Rows and columns of the result that one multiprocessor works on at a time."""
FILL = 128
"""Time of a tile's first loads and last stores, in steps of the inner dimension."""
REUSE = 8.0
"""Loads that a square tile cannot hide, in steps: small tiles load more for each operation."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """`times` equal kernels that run one after another."""

    rows: int = 0
    """Rows of a matmul's result; 0 = no matmul: the kernel only reads and writes memory."""
    columns: int = 0
    inner: int = 0
    """Length of the sums."""
    batch: int = 1
    """Matmuls in one kernel."""
    half: bool = True
    """16-bit operands."""
    moved: float = 0.0
    """Bytes read and written; 0 = those of the operands and the result."""
    times: float = 1.0

    @property
    def flops(self) -> float:
        """Operations of all of them."""
        return 2.0 * self.rows * self.columns * self.inner * self.batch * self.times


Work = tuple[Kernels, ...]


def seconds(work: Iterable[Kernels], hardware: Hardware) -> float:
    """Time of kernels that run one after another."""
    return sum(k.times * _one(k, hardware) for k in work)


def flops(work: Iterable[Kernels]) -> float:
    """Operations of all matmuls."""
    return sum(k.flops for k in work)


@lru_cache(maxsize=4096)
def _one(k: Kernels, hardware: Hardware) -> float:
    if not k.rows:
        return k.moved / (hardware.bandwidth * hardware.streamed) + hardware.launch
    size = 2 if k.half else 4
    operands = k.rows * k.inner + k.inner * k.columns + k.rows * k.columns
    moved = k.moved or size * k.batch * operands
    memory = moved / (hardware.bandwidth * hardware.streamed)
    peak = (hardware.half_flops if k.half else hardware.full_flops) * hardware.sustained
    if hardware.units == 1:
        return 2.0 * k.rows * k.columns * k.inner * k.batch / peak + memory + hardware.launch
    return max(memory, min(_tiled(k, tile, peak, hardware) for tile in TILES)) + hardware.launch


def _tiled(k: Kernels, tile: tuple[int, int], peak: float, hardware: Hardware) -> float:
    """Seconds of a matmul in whole waves of tiles; the last wave takes as long as a full one."""
    rows, columns = tile
    tiles = -(-k.rows // rows) * -(-k.columns // columns) * k.batch
    waves = -(-tiles // hardware.units)
    reuse = rows * columns / (rows + columns)
    most = TILES[0][0] * TILES[0][1] / sum(TILES[0])
    share = (reuse / (reuse + REUSE)) / (most / (most + REUSE))
    each = 2.0 * rows * columns * (k.inner + FILL) / (peak / hardware.units)
    return waves * each / share
