"""What enters a tensor-parallel region, and which settings of sequence parallelism are refused."""

import pytest
import torch

from parallel.config import EngineConfig, MeshConfig, ModelSizes
from parallel.tensor.ops import TensorParallel, compute_dtype
from training.presets import prior_tiny


def test_states_are_cast_once_and_their_gradients_added_in_fp32() -> None:
    """1 + 2^-8 + 2^-8 is 1.0078125 in fp32, and 1 if bf16 adds the terms one by one."""
    x = torch.ones(1, 2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        copies = TensorParallel().enter(x, 3)
    assert {copy.dtype for copy in copies} == {torch.bfloat16}
    assert len({copy.data_ptr() for copy in copies}) == 1
    slopes = (1.0, 2.0**-8, 2.0**-8)
    sum((copy * slope).sum() for copy, slope in zip(copies, slopes, strict=True)).backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert x.grad.unique().tolist() == [1.0078125]


def test_states_stay_as_they_are_without_autocast() -> None:
    x = torch.ones(1, 2, 4)
    assert all(copy is x for copy in TensorParallel().enter(x, 2))
    assert compute_dtype(torch.ones(1, dtype=torch.int64)) == torch.int64


def test_sequence_parallelism_cuts_whole_positions_over_tensor_ranks() -> None:
    sizes = ModelSizes(heads=8, layers=2, cuttable=True, positions=22)
    shared = MeshConfig(tensor=2, sequence_parallel=True)
    assert not shared.problems(2, sizes)
    (alone,) = MeshConfig(sequence_parallel=True).problems(1, sizes)
    assert "mesh.tensor is 1" in alone
    (odd,) = MeshConfig(tensor=4, sequence_parallel=True).problems(4, sizes)
    assert "does not divide the 22 positions" in odd and "2 more text positions" in odd
    assert prior_tiny().sizes().positions == prior_tiny().model.length


def test_buckets_below_zero_are_refused() -> None:
    (problem,) = EngineConfig(reduce_bucket_size=-1).problems(1, MeshConfig(), False)
    assert "reduce_bucket_size=-1" in problem


@pytest.mark.parametrize("sequence", [False, True])
def test_a_lone_rank_holds_all(sequence: bool) -> None:
    tensor, x = TensorParallel(), torch.ones(1, 2, 4)
    tensor.sequence = sequence
    parts = (tensor.leave(x), tensor.share(x), tensor.assemble(x), tensor.whole_states(x))
    assert all(part is x for part in parts)
