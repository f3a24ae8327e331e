"""torch's flags for fp32 matmuls and convolutions, and for bitwise reproducible steps.

No other module sets these flags. Only torch's older setters are used: they stay consistent with its
newer getters (`fp32_precision`) on every supported torch. After a newer setter the older getters
raise, and so does Inductor, which calls them (pytorch 166387).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from core.config import to_json
from parallel.config import EngineConfig
from parallel.device import CPU

PROBE_SIZE = 256
WORST_ERROR = 2e-6
"""Relative error against float64 that still counts as fp32 accuracy."""
WORKSPACE = ":4096:8"
"""cuBLAS workspace with which its results do not depend on other streams."""
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Settings that decide the last bits of results; stored in checkpoints and token sets."""

    matmul: str
    """fp32 matmuls. highest: fp32 throughout. medium: TF32 on GPUs; on CPUs bf16 if oneDNN has
    instructions for it, else another fp32 kernel."""
    conv: str
    """fp32 convolutions, likewise; never medium on CPUs."""
    deterministic: bool
    """True if the same step on the same device gives the same bits."""
    device: str
    """Kind of GPU, or of CPU with torch's instruction set."""
    software: str
    """Versions of torch, CUDA and cuDNN."""
    precision: str = "fp32"
    """Precision of matmuls outside of norms, logits and sums: fp32, bf16 or fp16."""

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Differences from the recorded settings of other results; absent fields are ignored."""
        now = to_json(self)
        names = [field.name for field in fields(self) if field.name in recorded]
        return [f"{n} {recorded[n]}, now {now[n]}" for n in names if recorded[n] != now[n]]


def set_numerics(
    device: torch.device,
    matmul: str = "highest",
    deterministic: bool = True,
    precision: str = "fp32",
) -> Numerics:
    """Set how this process computes on a device; call it before the first matmul there.

    `matmul` is highest, medium or auto, as in EngineConfig (auto = highest, unless training has
    resolved it before). fp32 results that must equal those of another device need highest.
    `deterministic` chooses deterministic algorithms on GPUs; torch warns of operations without one.
    `precision` is only recorded: the engine applies it.
    """
    matmul = "highest" if matmul == "auto" else matmul
    set_flags(device.type, matmul, deterministic)
    on_gpu = device.type == "cuda"
    return Numerics(
        matmul=matmul,
        conv=matmul if on_gpu else "highest",
        deterministic=deterministic or not on_gpu,
        device=_name_of(device),
        software=_software(),
        precision=precision,
    )


def engine_numerics(device: torch.device, engine: EngineConfig) -> Numerics:
    """`set_numerics` as an engine's settings ask for."""
    asked = (engine.matmul_precision, engine.deterministic, engine.precision)
    return set_numerics(device, *asked)


def set_flags(kind: str, matmul: str, deterministic: bool) -> None:
    """Set torch's flags for a type of device."""
    on_gpu = kind == "cuda"
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = on_gpu and matmul != "highest"
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    strict = deterministic and on_gpu
    torch.backends.cudnn.deterministic = strict
    if strict != torch.are_deterministic_algorithms_enabled():  # the setter imports Inductor
        torch.use_deterministic_algorithms(strict, warn_only=True)
        # costs a pass over every new tensor, only to expose reads of uninitialised memory
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def medium_is_accurate() -> bool:
    """True if this CPU's fp32 matmuls at `medium` are as accurate as at `highest`."""
    draws = torch.Generator(CPU).manual_seed(0)
    shape = (PROBE_SIZE, PROBE_SIZE)
    a, b = (torch.randn(shape, generator=draws, device=CPU) for _ in range(2))
    exact = a.double() @ b.double()
    with _matmuls("medium"):
        product = a @ b
    return float((product.double() - exact).norm() / exact.norm()) < WORST_ERROR


def small_matmuls() -> AbstractContextManager[None]:
    """Context for CPU kernels that multiply many small fp32 matrices.

    At `medium` torch calls oneDNN for each, which takes longer than the product itself.
    """
    return _matmuls("highest")


@contextmanager
def _matmuls(matmul: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"


def _software() -> str:
    versions = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return versions
    return f"{versions}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
