"""Placements, stages, grids and the meshes that are refused."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.reader import open_checkpoint
from checkpoint.writer import write_checkpoint
from core.errors import InputError
from core.launch_environment import Ranks, ranks_given, ranks_of
from core.storage.store import FolderStore
from models.config import PriorConfig
from models.prior import COMPRESSED, PriorBlock, build_prior, prior_layers
from parallel.compress.powersgd import shard_rank
from parallel.config import CompressConfig, EngineConfig, EngineName, MeshConfig, ModelSizes
from parallel.mesh import RankCoordinates, axis_ranks, coordinates_of, rank_at
from parallel.pipelines.balance import balanced_starts
from parallel.pipelines.schedules import Schedule
from parallel.placement import Placement, placement_of, rows_of
from parallel.tensor.ops import TensorParallel
from parallel.world import srun_ranks


class _Rank(TensorParallel):
    """A tensor-parallel rank whose layers are only built, never run."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def embedding(self, rows: int, width: int) -> torch.nn.Module:
        return torch.nn.Embedding(rows // self.size, width)


@given(rows=st.integers(1, 40), unit=st.integers(1, 5), size=st.integers(1, 7))
def test_rows_are_dealt_once_in_whole_units(rows: int, unit: int, size: int) -> None:
    rows *= unit
    parts = [rows_of(rows, unit, rank, size) for rank in range(size)]
    assert len({padded for _, _, padded in parts}) == 1
    at = 0
    for first, real, padded in parts:
        assert first == at and 0 <= real <= padded and real % unit == 0
        at += real
    assert at == rows


@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=8), data=st.data())
def test_the_dearest_stage_is_as_cheap_as_can_be(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    starts = balanced_starts(costs, stages)
    assert starts[0] == 0 and starts[-1] == len(costs) and starts == sorted(set(starts))
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(_dearest(costs, [0, *cut, len(costs)]) for cut in cuts)
    assert _dearest(costs, starts) == best


def _dearest(costs: list[int], starts: list[int]) -> int:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(starts))


def test_the_grid_has_tensor_ranks_beside_each_other() -> None:
    mesh = MeshConfig(tensor=2, pipeline=2, data=2)
    assert axis_ranks(mesh, "tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axis_ranks(mesh, "data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert axis_ranks(mesh, "pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_coordinates_of_a_rank_lead_back_to_it() -> None:
    mesh = MeshConfig(tensor=2, pipeline=3, data=4)
    assert coordinates_of(mesh, 13) == RankCoordinates(stage=1, replica=2, shard=1)
    assert [rank_at(mesh, coordinates_of(mesh, rank)) for rank in range(24)] == list(range(24))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tensor_ranks_draw_the_rows_of_one_rank(size: int, tmp_path: Path) -> None:
    """5 heads and odd vocabularies: most sizes pad; the saved model is that of one rank."""
    config = PriorConfig(
        dim=40, heads=5, layers=1, text_length=3, text_vocabulary=13, image_vocabulary=7, grid=2
    )
    whole = dict(build_prior(config, 3).named_parameters())
    slices = []
    for rank in range(size):
        for layer in prior_layers(config, 3, _Rank(rank, size)):
            for name, parameter in layer.build().named_parameters():
                place = placement_of(parameter)
                if place.split or rank == 0:
                    part = place.slice(f"{layer.name}.{name}", "master", 0, parameter)
                    slices += [part] if part is not None else []
                if place.split:
                    assert not parameter[place.rows :].any(), "padding must be zero"
    write_checkpoint(FolderStore(tmp_path), "step-1", slices, {}, 0, lambda text: [text])
    reader = open_checkpoint(f"{tmp_path}/step-1")
    assert reader.shapes() == {name: tuple(p.shape) for name, p in whole.items()}
    for name, parameter in whole.items():
        assert reader.tensor(name, "master").equal(parameter)


@pytest.mark.parametrize("shards", [3, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_zero3_shards_are_drawn_as_parts_of_the_whole(size: int, shards: int) -> None:
    """Most shards begin within a row, and 160 rows are several blocks of keys."""
    config = PriorConfig(
        dim=40, heads=5, layers=1, text_length=3, text_vocabulary=13, image_vocabulary=7, grid=2
    )
    for layer in prior_layers(config, 3, _Rank(size - 1, size)):
        assert layer.draw is not None
        for name, parameter in layer.build().named_parameters():
            count = -(-parameter.numel() // shards)
            drawn = torch.full((shards, count), math.nan)
            for rank in range(shards):
                layer.draw(name, placement_of(parameter), rank * count, drawn[rank])
            whole, padding = drawn.view(-1).tensor_split([parameter.numel()])
            assert whole.view_as(parameter).equal(parameter), f"{layer.name}.{name}"
            assert not padding.any()


def test_a_flat_range_reads_back_with_zeros_for_padding(tmp_path: Path) -> None:
    place = Placement(shape=(5, 2), first=3, rows=2, split=True)
    local = torch.arange(1.0, 7.0)  # rows 3, 4 and one row of padding
    local[4:] = 0
    other = Placement(shape=(5, 2), first=0, rows=3, split=True)
    parts = [place.slice("w", "master", 1, local[1:]), place.slice("w", "master", 0, local[:1])]
    parts.append(other.slice("w", "master", 0, -torch.ones(6)))
    write_checkpoint(
        FolderStore(tmp_path), "step-1", [p for p in parts if p], {}, 0, lambda text: [text]
    )
    reader = open_checkpoint(f"{tmp_path}/step-1")
    assert reader.tensor("w", "master")[3:].flatten().tolist() == [1, 2, 3, 4]
    assert place.read(reader, "w", "master", 2, 4).tolist() == [3, 4, 0, 0]
    assert place.slice("w", "master", 4, local[4:]) is None


def _scheduled(
    schedule: Schedule, chunks: int, steps: int = 4, name: EngineName = "torch", **engine: bool
) -> EngineConfig:
    return EngineConfig(
        name=name,
        schedule=schedule,
        virtual_stages=chunks,
        gradient_accumulation_steps=steps,
        **engine,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("mesh", "engine", "compress", "expected"),
    [
        (MeshConfig(tensor=9), EngineConfig(name="deepspeed_pipe"), 0, "more than 6 heads; try 6"),
        (MeshConfig(pipeline=7), EngineConfig(name="deepspeed_pipe"), 0, "7 is more than 5 layers"),
        (MeshConfig(data=8, nodes=3), EngineConfig(name="deepspeed_zero", zero_stage=3), 0, "2"),
        (MeshConfig(data=2, nodes=2), EngineConfig(), 0, "leaves one replica a node"),
        (MeshConfig(tensor=2), EngineConfig(), 0, "use --engine.name deepspeed_zero"),
        (MeshConfig(pipeline=2), EngineConfig(), 0, "use --engine.name deepspeed_pipe"),
        (MeshConfig(pipeline=2), EngineConfig(name="deepspeed_zero"), 0, "deepspeed_pipe"),
        (MeshConfig(data=2), EngineConfig(name="deepspeed_pipe", zero_stage=3), 0, "stage 1"),
        (MeshConfig(data=2), EngineConfig(gradient_accumulation_steps=3), 0, "try 2"),
        (MeshConfig(), EngineConfig(name="deepspeed_zero"), 0, "at least 2 ranks"),
        (MeshConfig(data=4, nodes=2), EngineConfig(name="deepspeed_zero"), 0, "paper's layout"),
        (MeshConfig(data=4), EngineConfig(name="deepspeed_zero", zero_stage=3), 8, "mesh.nodes"),
        (MeshConfig(tensor=2), EngineConfig(name="deepspeed_pipe"), 8, "no gradients are sent"),
        (MeshConfig(), EngineConfig(name="torch"), 0, "at least 2 ranks"),
        (MeshConfig(pipeline=2), EngineConfig(name="torch"), 0, "1f1b on 2 stages; try 2"),
        (
            MeshConfig(pipeline=4),
            _scheduled("interleaved", 2),
            0,
            "8 chunks of layers, more",
        ),
        (MeshConfig(pipeline=2), _scheduled("interleaved", 3), 0, "try --engine.virtual-stages 2"),
        (MeshConfig(pipeline=2), _scheduled("interleaved", 1), 0, "interleaved takes 2 or more"),
        (MeshConfig(pipeline=2), _scheduled("1f1b", 2), 0, "virtual_stages=2 does not go with"),
        (MeshConfig(pipeline=3), _scheduled("zero-bubble", 1, 7), 0, "on 3 stages; try 6"),
        (MeshConfig(pipeline=2), _scheduled("zero-bubble", 1, recompute=True), 0, "no-recompute"),
        (MeshConfig(data=2), _scheduled("zero-bubble", 1), 0, "with 2 or more --mesh.pipeline"),
        (
            MeshConfig(pipeline=2),
            _scheduled("interleaved", 2, name="deepspeed_pipe"),
            0,
            "use --engine.name torch",
        ),
        (MeshConfig(data=4), EngineConfig(name="torch"), 8, "set mesh.nodes"),
        (MeshConfig(tensor=2, data=4, nodes=2), EngineConfig(name="torch"), 0, "mesh.tensor 1"),
    ],
)
def test_impossible_choices_are_named_with_the_nearest_possible(
    mesh: MeshConfig, engine: EngineConfig, compress: int, expected: str
) -> None:
    sizes = ModelSizes(heads=6, layers=5, cuttable=True)
    problems = mesh.problems(None, sizes)
    problems += engine.problems(16 // mesh.data, mesh, compress > 0, sizes.layers)
    assert any(expected in text for text in problems), problems


@pytest.mark.parametrize(
    ("schedule", "chunks", "steps"),
    [
        ("1f1b", 1, 2),
        ("1f1b", 1, 16),
        ("interleaved", 2, 1),
        ("interleaved", 2, 8),
        ("zero-bubble", 1, 4),
        ("zero-bubble", 2, 4),
    ],
)
def test_possible_schedules_have_no_problems(schedule: Schedule, chunks: int, steps: int) -> None:
    """On GPUs, where attention is compiled, a zero bubble has one."""
    engine = _scheduled(schedule, chunks, steps)
    assert engine.problems(16, MeshConfig(pipeline=2), False, 5) == []
    on_gpus = engine.gpu_problems()
    assert bool(on_gpus) == (schedule == "zero-bubble")
    assert all("--engine.schedule interleaved" in text for text in on_gpus)


def test_compression_of_a_negative_rank_is_refused() -> None:
    assert CompressConfig(rank=-1).problems()


@pytest.mark.parametrize(
    ("dim", "rank", "saved"), [(1920, 512, 0.833), (2688, 640, 0.851), (3968, 896, 0.859)]
)
def test_the_papers_shards_save_what_the_paper_says(dim: int, rank: int, saved: float) -> None:
    """The matrices of a block as the layers hold them, sharded as ZeRO-3 does over 8 GPUs."""
    config = PriorConfig(dim=dim, heads=dim // 64, layers=1, text_length=2, grid=2)
    with torch.device("meta"):
        block = PriorBlock(config, 1, TensorParallel())
    shapes = []
    for name, parameter in block.named_parameters():
        if name.endswith(COMPRESSED):
            shard = placement_of(parameter).flat_shard(3, parameter.numel() // 8)
            assert shard is not None and shard.first == 3 * shard.rows
            shapes.append((shard.rows, shard.shape[1]))
    assert len(shapes) == 6
    each = shard_rank(rank, 8)
    raw = sum(rows * columns for rows, columns in shapes)
    sent = sum(each * (rows + columns) for rows, columns in shapes)
    assert 1 - sent / raw == pytest.approx(saved, abs=6e-4)


def test_ranks_of_srun_are_torchs() -> None:
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "2",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "node[1-2]",
    }
    assert ranks_of(slurm) == Ranks(launcher="srun", rank=3, size=4)
    batch_script = {name: value for name, value in slurm.items() if "STEP" not in name}
    assert ranks_of(batch_script) is None
    given = srun_ranks(slurm, lambda nodes: f"first of {nodes}")
    assert (given["RANK"], given["LOCAL_RANK"], given["WORLD_SIZE"]) == ("3", "1", "4")
    assert given["MASTER_ADDR"] == "first of node[1-2]"
    assert given["MASTER_PORT"] == str(20_000 + 7 * 31 + 2)


@pytest.mark.parametrize("text", ["zwei", "²", "٣", "0", "-1", ""])
def test_numbers_of_ranks_are_read_as_numbers_or_refused(text: str) -> None:
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": text}
    for environment in ({"WORLD_SIZE": text}, {"PMI_SIZE": text}, srun):
        with pytest.raises(InputError, match="not a number of ranks"):
            ranks_given(environment)
