"""megatron-core's process groups and tensor-parallel operations.

Its region mappings, vocabulary-parallel embedding and cross-entropy are used. Its linears are not:
their autograd function casts for CUDA only, so that bf16 fails on CPUs (docs/decisions/002).
"""

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
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
    return groups if ends is None else {**groups, "ends": ends}


class MegatronTensorParallel(TensorParallel):
    """The tensor group of megatron-core's `parallel_state`."""

    def __init__(self) -> None:
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def enter(self, x: Tensor) -> Tensor:
        out: Tensor = copy_to_tensor_model_parallel_region(x, self.group)
        return out

    def leave(self, x: Tensor) -> Tensor:
        out: Tensor = reduce_from_tensor_model_parallel_region(x.contiguous(), self.group)
        return out

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
