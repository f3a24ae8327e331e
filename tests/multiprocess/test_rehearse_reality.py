"""The rehearsed operations of each rank equal those that it really runs over gloo."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.config import CheckpointConfig, ErrorBuffers
from models.config import ClipConfig, DVAEConfig, PriorConfig
from parallel.config import CompressConfig, EngineConfig, MeshConfig, OptimConfig
from planning.rehearsal.pool import Pool
from planning.rehearsal.rank import RankTask, run_rank, train
from planning.rehearsal.recorder import Listening, Recorder, groups_noted, texts_noted
from planning.rehearsal.sequence import CREATE, OBJECTS, Sequence
from training.config import ClipTrain, DVAETrain, LoopConfig, PriorTrain

MODEL = PriorConfig(
    dim=48, heads=6, layers=3, text_length=6, text_vocabulary=50, image_vocabulary=30, grid=4
)


def prior(
    mesh: MeshConfig,
    rank: int = 0,
    precision: Any = "fp32",
    samples: int = 2,
    errors: ErrorBuffers = "auto",
    payload: Any = "fp32",
    **engine: Any,
) -> PriorTrain:
    """A small prior with a micro-batch of `samples`."""
    settings = EngineConfig(gradient_accumulation_steps=2, precision=precision, **engine)
    return PriorTrain(
        model=MODEL,
        mesh=mesh,
        engine=settings,
        compress=CompressConfig(rank=rank, payload=payload),
        checkpoint=CheckpointConfig(errors=errors),
        loop=LoopConfig(global_batch_size=2 * samples * mesh.data),
        optim=OptimConfig(clip_norm=0.5),
    )


CASES: dict[str, tuple[str, Any]] = {
    "TP2 x PP2, bf16, recomputed": (
        "prior",
        prior(
            MeshConfig(tensor=2, pipeline=2),
            name="deepspeed_pipe",
            precision="bf16",
            samples=1,
            recompute=True,
        ),
    ),
    "SP2 x PP2, bf16, selective": (
        "prior",
        prior(
            MeshConfig(tensor=2, pipeline=2, sequence_parallel=True),
            name="deepspeed_pipe",
            precision="bf16",
            recompute=True,
            recompute_granularity="selective",
        ),
    ),
    "SP2 x DP2, ZeRO-2, compressed in 16 bits": (
        "prior",
        prior(
            MeshConfig(tensor=2, data=2, sequence_parallel=True),
            rank=8,
            payload="bf16",
            name="deepspeed_zero",
            zero_stage=2,
            reduce_bucket_size=1000,
        ),
    ),
    "PP2 x DP2, compressed": (
        "prior",
        prior(MeshConfig(pipeline=2, data=2), rank=8, name="deepspeed_pipe"),
    ),
    "TP2 x DP2, ZeRO-1, fp16": (
        "prior",
        prior(MeshConfig(tensor=2, data=2), name="deepspeed_zero", precision="fp16"),
    ),
    "paper layout, 2 nodes of 2": (
        "prior",
        prior(
            MeshConfig(data=4, nodes=2), rank=8, errors="mean", name="deepspeed_zero", zero_stage=3
        ),
    ),
    "torch, TP2 x DP2, bf16": (
        "prior",
        prior(MeshConfig(tensor=2, data=2), name="torch", precision="bf16"),
    ),
    "torch, 2 nodes of 2": (
        "prior",
        prior(MeshConfig(data=4, nodes=2), rank=8, errors="mean", name="torch"),
    ),
    **{
        f"torch, PP2, {schedule}": (
            "prior",
            replace(
                prior(
                    MeshConfig(pipeline=2),
                    name="torch",
                    schedule=schedule,
                    virtual_stages=1 if schedule == "1f1b" else 2,
                ),
                model=replace(MODEL, layers=4),
            ),
        )
        for schedule in ("1f1b", "interleaved", "zero-bubble")
    },
    "dVAE, torch": (
        "dvae",
        DVAETrain(
            model=DVAEConfig(pixels=16, width=8, groups=2, codebook=16, code_width=8),
            mesh=MeshConfig(data=2),
            engine=EngineConfig(name="torch", gradient_accumulation_steps=2),
            loop=LoopConfig(global_batch_size=8),
        ),
    ),
    "dVAE, DP2, ZeRO-2": (
        "dvae",
        DVAETrain(
            model=DVAEConfig(pixels=16, width=8, groups=2, codebook=16, code_width=8),
            mesh=MeshConfig(data=2),
            engine=EngineConfig(name="deepspeed_zero", zero_stage=2, gradient_accumulation_steps=2),
            loop=LoopConfig(global_batch_size=8),
        ),
    ),
    "dVAE, DP2": (
        "dvae",
        DVAETrain(
            model=DVAEConfig(pixels=16, width=8, groups=2, codebook=16, code_width=8),
            mesh=MeshConfig(data=2),
            loop=LoopConfig(global_batch_size=8),
        ),
    ),
    "CLIP, DP2": (
        "clip",
        ClipTrain(
            model=ClipConfig(pixels=8, dim=16, layers=1, text_length=4, text_vocabulary=20),
            mesh=MeshConfig(data=2),
            loop=LoopConfig(global_batch_size=8),
        ),
    ),
}


def run_real(task: RankTask, _: Any) -> Sequence:
    """A real rank: it joins the others over gloo, and computes and evaluates everything."""
    out = task.settings.out
    os.environ.update(
        RANK=str(task.rank),
        WORLD_SIZE=str(task.settings.mesh.world),
        LOCAL_RANK=str(task.rank),
        TAPIR_RENDEZVOUS=f"file://{out}/rendezvous",
        GLOO_SOCKET_IFNAME="lo",
    )
    recorder = Recorder(task.rank)
    noted = groups_noted(recorder, lambda named: None)
    with noted, texts_noted(recorder, rehearsed=False), Listening(recorder):
        train(task)
        recorder.close_groups()
        sequence = replace(recorder.sequence, operations=list(recorder.sequence.operations))
        torch.distributed.barrier()  # no rank leaves while another one still waits for it
        torch.distributed.destroy_process_group()
    return sequence


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One process that has imported the engines, for all cases."""
    with Pool("cpu") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_rehearsed_sequence_equals_the_real_one(name: str, pool: Pool, tmp_path: Path) -> None:
    """On every rank, over steps, validations, saves and the end: the same operations in the same
    order, of the same groups, types, bytes and backends, from the same lines."""
    stage, settings = CASES[name]
    settings = replace(settings, out=tmp_path)
    world = settings.mesh.world
    tasks = [
        RankTask(stage=stage, settings=settings, rank=rank, steps=2, device="cpu")
        for rank in range(world)
    ]
    real = pool.run(tasks, run_real, world)
    rehearsed = pool.run(tasks, run_rank, 2)
    for one, other in zip(rehearsed, real, strict=True):
        assert not one.failure, one.failure
        assert one.created == other.created
        for i, (mine, theirs) in enumerate(zip(one.operations, other.operations, strict=False)):
            assert mine == theirs, f"rank {one.rank}, operation {i}"
        assert len(one.operations) == len(other.operations) > 9


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pool]:
    """A process whose ranks claim a GPU each."""
    with Pool("cuda") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "TP2 x PP2, bf16, recomputed",
        "paper layout, 2 nodes of 2",
        "torch, 2 nodes of 2",
        "torch, PP2, interleaved",
        "dVAE, torch",
        "dVAE, DP2",
    ],
)
def test_ranks_that_claim_gpus_make_the_calls_of_those_on_the_cpu(
    name: str, pool: Pool, gpus: Pool
) -> None:
    """fp16 aside, which is emulated on CPUs: the same calls, tensors by nccl, objects by gloo."""
    stage, settings = CASES[name]
    sequences = {}
    for running in (pool, gpus):
        device = running.device
        ends = [0, settings.mesh.world - 1]
        tasks = [
            RankTask(stage=stage, settings=settings, rank=rank, steps=1, device=device)
            for rank in (ends if settings.mesh.pipeline == 1 else range(settings.mesh.world))
        ]
        sequences[device] = running.run(tasks, run_rank, 2)
    for one, other in zip(sequences["cpu"], sequences["cuda"], strict=True):
        assert not other.failure, other.failure
        for mine, theirs in zip(one.operations, other.operations, strict=True):
            backend = "" if theirs.kind == CREATE else "gloo" if theirs.dtype == OBJECTS else "nccl"
            device = {"": "", "gloo": "cpu", "nccl": "cuda"}[backend]
            assert replace(mine, device=device, backend=backend) == theirs
