"""DeepSpeed's private parts that Tapir touches, guarded by an exact version check."""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from core.errors import ConfigError

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
TESTED = ("0.19.8",)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of a parameter whose optimiser state lives on this rank."""

    master: Tensor
    start: int
    """First element of the parameter, flat."""
    stop: int
    state: dict[str, Tensor]
    """Optimiser state of the whole partition."""
    offset: int
    """Where the fragment begins in the partition."""


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Build a DeepSpeed engine over the joined process group, without run-time C++ builds.

    Raises: ConfigError for a version whose private parts were never tested.
    """
    version = importlib.metadata.version("deepspeed")
    if version not in TESTED:
        raise ConfigError(
            f"deepspeed {version} is installed; the engine's hooks are tested with "
            f"{', '.join(TESTED)}: pip install deepspeed=={TESTED[-1]}"
        )
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def fragments(optimizer: Any, parameter: nn.Parameter) -> Iterator[Fragment]:
    """The fragments of a parameter that this rank owns under ZeRO-1 (one or none)."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return
    partition = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    address = mapping.lp_fragment_address
    yield Fragment(
        master=mapping.get_hp_fragment(),
        start=address.start,
        stop=address.start + address.numel,
        state=optimizer.optimizer.state[partition],
        offset=mapping.get_hp_fragment_address().start,
    )


def ensure_adam_state(optimizer: Any) -> None:
    """Give every partition zero moments, as its first step would."""
    for partition in optimizer.single_partition_of_fp32_groups:
        state = optimizer.optimizer.state[partition]
        if "exp_avg" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(partition)
            state["exp_avg_sq"] = torch.zeros_like(partition)
