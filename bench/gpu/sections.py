"""The sections of the GPU benchmark, in their order."""

SECTIONS = {
    "ceilings": ("bench.gpu.kernels:ceilings", 40.0),
    "attention equals dense": ("bench.gpu.kernels:attention_equals_dense", 90.0),
    "steps equal the CPU's": ("bench.gpu.numerics:steps", 60.0),
    "checkpoints": ("bench.gpu.numerics:checkpoints", 60.0),
    "resblocks": ("bench.gpu.training:resblocks", 60.0),
    "attention": ("bench.gpu.kernels:attention", 90.0),
    "training": ("bench.gpu.training:training", 150.0),
    "pictures": ("bench.gpu.pictures:pictures", 90.0),
    "compression": ("bench.gpu.compression:compression", 40.0),
    "decoding equals no cache": ("bench.gpu.sampling:decoding", 90.0),
    "sampling": ("bench.gpu.sampling:sampling", 120.0),
}
"""Name -> function, and the most seconds that it may take."""
