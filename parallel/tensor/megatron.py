"""megatron-core's process groups and tensor-parallel operations.

Its vocabulary-parallel embedding and cross-entropy are used. Its linears and sequence parallelism
are not: their autograd functions are for CUDA only, and cut the first axis (docs/decisions/002).
"""

from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy
from torch import Tensor, nn

from parallel.tensor.ops import TensorParallel


def megatron_groups(tensor: int, pipeline: int) -> dict[str, "dist.ProcessGroup"]:
    """Build megatron-core's groups over the joined world, by the names of the mesh's axes.

    `ends`, the first and the last stage, is absent on the stages between them.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
    }
    ends = parallel_state.get_embedding_group(check_initialized=False)
    if ends is not None:
        groups["ends"] = ends
    _free_all_but(list(groups.values()))
    return groups


def _free_all_but(kept: list["dist.ProcessGroup"]) -> None:
    """Destroy megatron-core's other groups: thirteen, each with polling threads and buffers."""
    for name, made in list(vars(parallel_state).items()):
        others = list(made) if isinstance(made, list) else [made]
        others = [g for g in others if isinstance(g, dist.ProcessGroup) and g not in kept]
        for group in others:
            if group in dist.distributed_c10d._world.pg_map:  # two names may mean one group
                dist.destroy_process_group(group)
        if others:
            setattr(parallel_state, name, None)


class MegatronTensorParallel(TensorParallel):
    """The tensor group of megatron-core's `parallel_state`."""

    def __init__(self, sequence: bool = False) -> None:
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.sequence = sequence

    def add_up(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def gather_sequence(self, x: Tensor) -> Tensor:
        samples, positions, width = x.shape
        parts = x.new_empty(self.size * samples, positions, width)
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self.group)
        whole: Tensor = parts.unflatten(0, (self.size, samples)).transpose(0, 1).flatten(1, 2)
        return whole

    def scatter_sum(self, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=self.group)
        return mine

    def look_up(self, table: nn.Module, ids: Tensor) -> Tensor:
        if not self.sequence:
            return super().look_up(table, ids)
        weight = cast(Tensor, table.weight)
        own = ids - self.rank * len(weight)
        outside = (own < 0) | (own >= len(weight))
        vectors = F.embedding(own.masked_fill(outside, 0), weight)
        return vectors.masked_fill(outside[..., None], 0.0)

    def gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)  # megatron's is for CUDA only
        return torch.cat(parts, -1)

    def embedding(self, rows: int, width: int) -> nn.Module:
        config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        table: nn.Module = VocabParallelEmbedding(
            rows, width, init_method=nn.init.zeros_, config=config, tp_group=self.group
        )
        return table

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = vocab_parallel_cross_entropy(logits, targets)
        return losses
