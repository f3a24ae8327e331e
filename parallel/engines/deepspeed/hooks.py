"""DeepSpeed's private parts that Tapir touches, guarded by an exact version check.

- the optimiser state's fragments (`_hp_mapping`, `grad_position`), for checkpoints without pickles;
- `average_tensor` of ZeRO-1/2 and the step of ZeRO-3, where gradients are reduced, for compression;
- the overflow check and norm of both, replaced by one number over all ranks;
- ZeRO-3's parameters and flat groups, which `zero3_shards.py` creates itself.
"""

import contextlib
import importlib.metadata
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.gpus import usable_gpus

os.environ.setdefault("DS_ACCELERATOR", "cuda" if usable_gpus() else "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from core.errors import ConfigError
from parallel.mesh import Mesh

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
__all__ = ["LayerSpec", "PipeModelDataParallelTopology", "PipelineModule"]
TESTED = ("0.19.8",)

Gradients = dict[str, Tensor]
Reduce = Callable[[Gradients], Gradients]
"""Local gradients by name -> gradients averaged over the replicas, flat."""
Norm = Callable[[Gradients], float]
"""Averaged gradients of this rank's partition by name -> the global norm; infinity skips."""


class GroupsOfMesh:
    """The mesh's groups as DeepSpeed's `mpu`: optimiser state is sharded over the data group."""

    def __init__(self, mesh: Mesh, data: str) -> None:
        """`data` names the mesh's group over which DeepSpeed reduces and shards."""
        chosen = getattr(mesh, data)
        handle = mesh.tensor.handle
        if handle is None:
            own = [mesh.world.rank]
            handle = dist.new_group(own, use_local_synchronization=True)
        self._data, self._tensor, self._model = chosen, mesh.tensor, handle

    def get_data_parallel_group(self) -> Any:
        return self._data.handle

    def get_data_parallel_world_size(self) -> int:
        return int(self._data.size)

    def get_data_parallel_rank(self) -> int:
        return int(self._data.rank)

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of a flat local parameter whose optimiser state lives on this rank."""

    master: Tensor
    """A view: writing to it changes the fp32 weights."""
    start: int
    """First element of the flat local parameter."""
    state: dict[str, Tensor]
    """Views of the moments, and the step count."""


def initialize(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    device: torch.device,
    mpu: GroupsOfMesh | None = None,
) -> Any:
    """Build a DeepSpeed engine over the joined process group, without run-time C++ builds.

    Raises: ConfigError for a version whose private parts were never tested, and for overlap_comm.
    """
    if config.get("zero_optimization", {}).get("overlap_comm"):
        raise ConfigError(
            "overlap_comm must be off: the hook that averages gradients does not wait for the "
            "streams that DeepSpeed's own one waits for"
        )
    start_comm(device)
    for parameter in module.parameters():
        if parameter.dim() and parameter.stride(-1) != 1:  # channels last: no view as bytes
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    with quiet():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=mpu)
    return engine


def start_comm(device: torch.device) -> None:
    """Let DeepSpeed adopt the joined process group, and this rank's device.

    DeepSpeed reads the GPU's index from LOCAL_RANK; it is 0 if each rank sees only its own GPU.
    Raises: ConfigError for a version whose private parts were never tested.
    """
    version = importlib.metadata.version("deepspeed")
    if version not in TESTED:
        raise ConfigError(
            f"deepspeed {version} is installed; the engine's hooks are tested with "
            f"{', '.join(TESTED)}: pip install deepspeed=={TESTED[-1]}"
        )
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what DeepSpeed prints at start-up off standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def hook_zero12(optimizer: Any, names: Mapping[str, nn.Parameter], norm: Norm) -> None:
    """Replace the overflow check and global norm of ZeRO-1/2 by `norm`."""
    name_of = {id(parameter): name for name, parameter in names.items()}

    def check_overflow(partition_gradients: bool = True) -> None:
        gradients: Gradients = {}
        for i, parameters in enumerate(optimizer.params_in_partition):
            real = (
                g for g in optimizer.averaged_gradients[i] if not getattr(g, "_zero_padding", False)
            )
            for parameter, gradient in zip(parameters, real, strict=False):
                gradients[name_of[id(parameter)]] = gradient
        optimizer.tapir_norm = norm(gradients)
        optimizer.overflow = optimizer.tapir_norm == float("inf")

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        return torch.tensor(optimizer.tapir_norm, device="cpu")

    optimizer.check_grad_overflow = True
    optimizer.check_overflow = check_overflow
    optimizer.scaled_global_norm = scaled_global_norm


def compress_zero12(optimizer: Any, names: Mapping[str, nn.Parameter], reduce: Reduce) -> None:
    """Replace the averaging of ZeRO-1/2 by `reduce`; one bucket must hold all parameters."""
    name_of = {id(parameter): name for name, parameter in names.items()}

    def average_tensor(tensor: Tensor, communication_data_type: torch.dtype) -> None:
        views, at = {}, 0
        for group, index, _ in optimizer.ipg_buckets[communication_data_type].params:
            parameter = optimizer.bit16_groups[group][index]
            views[name_of[id(parameter)]] = tensor.narrow(0, at, parameter.numel())
            at += parameter.numel()
        for name, gradient in reduce(views).items():
            views[name].copy_(gradient)

    optimizer.average_tensor = average_tensor


def hook_zero3(optimizer: Any, names: Mapping[str, nn.Parameter], norm: Norm) -> None:
    """Replace the overflow check and norm of ZeRO-3 by `norm`, which may change gradients."""
    name_of = {id(parameter): name for name, parameter in names.items()}

    def check(update_scale: bool = True) -> bool:
        gradients = {
            name_of[id(parameter)]: gradient
            for i, group in enumerate(optimizer.fp16_groups)
            for parameter, gradient in zip(group, optimizer.averaged_gradients[i], strict=True)
        }
        optimizer.tapir_norm = norm(gradients)
        optimizer.overflow = optimizer.tapir_norm == float("inf")
        return bool(optimizer.overflow)

    optimizer._overflow_check_and_loss_scale_update = check
    optimizer._get_norm_groups = lambda: [torch.tensor(optimizer.tapir_norm, device="cpu")]


def fragments(optimizer: Any, parameter: nn.Parameter) -> Iterator[Fragment]:
    """Yield this rank's fragment of a parameter, if it owns one."""
    if hasattr(parameter, "ds_id"):
        group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        partition = optimizer.fp32_partitioned_groups_flat[group]
        place = slice(offset, offset + count)
        start = count * optimizer._get_param_partition_rank(parameter)
        master = partition.data[place]
    else:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        partition = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.get_hp_fragment_address()
        place = slice(address.start, address.start + address.numel)
        start = mapping.lp_fragment_address.start
        master = mapping.get_hp_fragment()
    state = optimizer.optimizer.state[partition]
    views = {name: value if name == "step" else value[place] for name, value in state.items()}
    yield Fragment(master=master, start=start, state=views)


def ensure_adam_state(optimizer: Any) -> None:
    """Create zero moments for every partition, as the first step does."""
    for partition in _partitions(optimizer):
        state = optimizer.optimizer.state[partition]
        if "exp_avg" not in state:
            state.update(optimizer.optimizer.first_state(partition))


def publish_masters(optimizer: Any) -> None:
    """Copy masters that were written through fragments to the weights of all ranks."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        gather_small(optimizer)
    else:
        optimizer.update_lp_params()


def gather_small(optimizer: Any) -> None:
    """Gather the small parameters that ZeRO-3 keeps whole, from their shards; else nothing."""
    if persistent := getattr(optimizer, "persistent_parameters", None):
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def held_bytes(optimizer: Any, names: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Bytes of weights, gradients and optimiser state that this rank holds during a step.

    ZeRO-1 keeps all gradients until they are reduced, ZeRO-2 those of parameters in this rank's
    partition. Both keep fp32 masters beside fp32 weights. ZeRO-3 also keeps small parameters whole.
    """
    parameters: list[Any] = list(names.values())
    partitions = _partitions(optimizer)
    moment = (optimizer.optimizer.moments or torch.float32).itemsize
    gradients = sum(p.numel() for p in parameters if p.requires_grad)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        weights = [p.ds_tensor for p in parameters]
        weights += [p.data for p in parameters if p.ds_persist]
        gradients = optimizer.grad_partitions_flat_buffer.numel()
    else:
        frozen = [p for p in parameters if not p.requires_grad]
        weights = [*optimizer.bit16_groups_flat, *frozen]
        if optimizer.partition_gradients:
            gradients = sum(p.numel() for group in optimizer.params_in_partition for p in group)
            gradients += sum(int(padding) for padding in optimizer.groups_padding)
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}
    masters = [p for p in partitions if p.untyped_storage().data_ptr() not in storages]
    return {
        "parameters": sum(storages.values()),
        "gradients": 4 * gradients,
        "optimizer": sum(4 * p.numel() for p in masters)
        + sum(2 * moment * p.numel() for p in partitions),
    }


def _partitions(optimizer: Any) -> list[Tensor]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)
