"""The parts of a plan: counting, schedules, kernels, links, the search and its verb."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.plan import plan
from core.errors import ConfigError, InputError
from core.memory import memory_unit, size_text
from models.config import PriorConfig
from models.counts import prior_parameters
from parallel.config import (
    CPU_BUCKET,
    GPU_BUCKET,
    CompressConfig,
    EngineConfig,
    EngineName,
    MeshConfig,
)
from parallel.mesh import RankCoordinates
from parallel.pipelines.balance import stage_layers
from parallel.placement import Placement
from planning.calibration.calibrate import (
    at_bounds,
    constants,
    overheads,
    runs_for_overheads,
    runs_for_steps,
)
from planning.config import settings_of
from planning.estimate.collectives import all_reduce, group_span
from planning.estimate.hardware import KNOWN, MEASURED, hardware_of
from planning.estimate.kernels import Kernels, flops, seconds
from planning.estimate.layer_work import compression_work, pairs
from planning.estimate.layers import Held, count_parameters, rank_layers
from planning.estimate.memory import CATEGORIES, loads_of, rank_bytes
from planning.estimate.pipeline_schedule import actions, crowded, play
from planning.estimate.reserve import NCCL, PROCESS, nccl_bytes
from planning.estimate.search import MOST_MICRO, Candidate, link_bucket, search, variants_of, weigh
from planning.estimate.step_time import estimate
from planning.estimate.zero_layout import bucket_of, factored, padded, touched
from tests.harness import tapir

TINY = settings_of("tiny")


@pytest.mark.parametrize("preset", ["paper_2_8b", "paper_5_6b", "paper_12b"])
def test_layers_hold_the_parameters_of_the_formula(preset: str) -> None:
    config = settings_of(preset).model
    assert count_parameters(config) == prior_parameters(config).total


def test_stages_hold_every_layer_once() -> None:
    parts = rank_layers(TINY.model, 0, 1)
    names = [part.name for stage in range(3) for part in stage_layers(parts, stage, 3)]
    assert names == [part.name for part in parts]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 8])
def test_stages_act_in_deepspeeds_order(stages: int, micro_batches: int) -> None:
    from deepspeed.runtime.pipe import schedule

    named = {
        "SendActivation": ("send", 1),
        "SendGrad": ("send", -1),
        "RecvActivation": ("receive", -1),
        "RecvGrad": ("receive", 1),
        "ForwardPass": ("forward", 0),
        "BackwardPass": ("backward", 0),
    }
    for stage in range(stages):
        theirs = schedule.TrainSchedule(micro_batches, stages, stage)
        commands = [type(command).__name__ for step in theirs.steps() for command in step]
        expected = [
            (kind, stage + direction if direction else -1)
            for kind, direction in (named[name] for name in commands if name in named)
        ]
        mine = [(a.kind, a.peer) for a in actions(stage, stages, micro_batches)]
        assert mine == expected


def test_the_bubble_of_even_stages_is_the_textbooks() -> None:
    """7 of 23 at 8 stages and 16 micro-batches, however long a backward pass takes."""
    assert play([1.0] * 8, [2.0] * 8, 16, 0.0).bubble == pytest.approx(7 / 23)
    assert play([1.0], [2.0], 4, 0.0).seconds == 12.0
    assert play([1.0] * 2, [2.0] * 2, 4, 0.5).seconds > play([1.0] * 2, [2.0] * 2, 4, 0.0).seconds


def test_ranks_that_share_cores_slow_each_other_down() -> None:
    """Two stages of two ranks on two cores: twice as slow while both stages compute."""
    played = play([1.0] * 2, [2.0] * 2, 4, 0.0)
    both = sum(played.busy) - played.seconds
    two = replace(KNOWN["cpu"], cores=2)
    assert crowded(played, 1, two) == crowded(played, 4, KNOWN["h100"]) == played.seconds
    assert crowded(played, 2, two) == pytest.approx(played.seconds + both)
    assert crowded(play([1.0], [2.0], 3, 0.0), 4, two) == pytest.approx(2 * 9.0)


def test_a_core_that_works_beside_others_is_slower() -> None:
    """At 80% of its rate: two ranks take 1.25 times as long, four on two cores twice that."""
    two = replace(KNOWN["cpu"], cores=2, together=0.8)
    assert [two.crowd(ranks) for ranks in (0, 1, 2, 4)] == pytest.approx([1.0, 1.0, 1.25, 2.5])
    three = replace(two, cores=3)
    assert [three.crowd(ranks) for ranks in (2, 3, 6)] == pytest.approx([1 / 0.9, 1.25, 2.5])
    played = play([1.0] * 2, [2.0] * 2, 4, 0.0)
    both = sum(played.busy) - played.seconds
    assert crowded(played, 1, two) == pytest.approx(played.seconds + 0.25 * both)


@pytest.mark.parametrize("cores", [1, 2, 32])
def test_calibration_finds_the_constants_that_the_steps_have(cores: int) -> None:
    """From the predicted times of steps, calibration recovers the constants that gave them."""
    runs = runs_for_steps(cores, EngineConfig(), EngineConfig(name="deepspeed_zero"))
    expected = {"sustained": 0.5, "together": 0.8, "link_latency": 9e-4, "joined": 0.3}
    hardware = replace(KNOWN["cpu"], cores=cores)
    true = replace(hardware, **expected)
    fitted = constants(runs, {n: estimate(run, true).seconds for n, run in runs.items()}, hardware)
    assert list(fitted) == (list(expected) if cores > 1 else ["sustained"])
    assert fitted == pytest.approx({name: expected[name] for name in fitted}, rel=0.01)


def test_a_calibration_on_a_busy_machine_is_told() -> None:
    good = {"sustained": 0.5, "together": 0.9999, "link_latency": 9e-4, "joined": 1.0}
    assert at_bounds(good) == []
    assert at_bounds(good | {"link_latency": 1.0000001e-6}) == ["link_latency"]
    assert at_bounds(good | {"link_latency": 0.09999, "joined": 0.0200001}) == [
        "link_latency",
        "joined",
    ]


def test_calibration_finds_pythons_cost() -> None:
    """From steps that cost nothing but Python's overhead."""
    expected = {"overhead": 1e-3, "step_overhead": 4e-2, "engine_overhead": 6e-3}
    runs = runs_for_overheads(EngineConfig(), EngineConfig(name="deepspeed_zero"))
    free = replace(KNOWN["cpu"], half_flops=1e29, full_flops=1e29, bandwidth=1e29, link=1e29)
    true = replace(free, cores=0, link_latency=0.0, launch=0.0, **expected)
    fitted = overheads({name: estimate(run, true).seconds for name, run in runs.items()})
    assert fitted == pytest.approx(expected, rel=1e-6)


def test_buckets_are_named_by_the_link() -> None:
    """5% of a bucket's time is latency: 20 x rate x latency x hops bytes, in fp32."""
    h100, cpu = hardware_of("h100"), hardware_of("cpu")
    inside = 20 * 0.8 * 450e9 * 8e-6 * 3 / 4  # 8 processors of a node, 3 hops
    assert link_bucket(MeshConfig(data=8), 1, h100) == 2**25 == 2 ** round(math.log2(inside))
    between = 20 * 0.8 * 400e9 / 2 * 15e-6 * 6 / 4  # 64 replicas, 2 groups share a node's network
    mesh = MeshConfig(data=64, tensor=2)
    assert link_bucket(mesh, 1, h100) == 2 ** min(26, round(math.log2(between)))
    assert (
        link_bucket(MeshConfig(data=8), 1, cpu) == link_bucket(MeshConfig(tensor=2), 1, h100) == 0
    )
    settings = replace(TINY, engine=EngineConfig(reduce_bucket_size=7))
    assert (bucket_of(TINY), bucket_of(settings)) == (CPU_BUCKET, 7)
    assert EngineConfig().bucket(gpu=True) == GPU_BUCKET


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9), replicas=st.integers(1, 5))
def test_partitions_touch_every_element(sizes: list[int], replicas: int) -> None:
    place = Placement(shape=(1,), first=0, rows=1, split=False)
    group = [Held(place, size) for size in sizes]
    whole = padded(group, replicas)
    assert whole % (2 * replicas) == 0 and 0 <= whole - sum(sizes) < 2 * replicas
    assert sum(touched(group, replicas, r) for r in range(replicas)) >= whole
    assert replicas > 1 or touched(group, 1, 0) == whole


def test_bytes_have_every_category_and_follow_the_choices() -> None:
    mesh = MeshConfig(data=4)
    one = replace(TINY, mesh=mesh, engine=EngineConfig(name="deepspeed_zero", precision="bf16"))
    base = rank_bytes(loads_of(one, RankCoordinates()))
    assert tuple(base) == CATEGORIES

    def other(**changes: Any) -> dict[str, int]:
        return rank_bytes(loads_of(replace(one, **changes), RankCoordinates()))

    assert other(engine=replace(one.engine, recompute=True))["activations"] < base["activations"]
    assert other(engine=replace(one.engine, zero_stage=2))["gradients"] < base["gradients"]
    assert other(engine=replace(one.engine, zero_stage=3))["optimizer"] <= base["optimizer"]
    assert other(compress=CompressConfig(rank=8))["compression"] > base["compression"] == 0
    half = other(optim=replace(one.optim, moments="bf16"))
    assert half["optimizer"] * 3 == base["optimizer"] * 2


def test_matmuls_come_in_whole_waves() -> None:
    gpu = hardware_of("a100-80gb")

    def time(rows: int, columns: int, inner: int) -> float:
        return seconds([Kernels(rows=rows, columns=columns, inner=inner)], gpu)

    large = Kernels(rows=16384, columns=16384, inner=8192)
    rate = flops([large]) / seconds([large], gpu)
    assert 0.7 * gpu.half_flops < rate < gpu.half_flops
    assert time(256 * 54, 256, 8192) == time(256 * 53, 256, 8192)
    assert time(256 * 55, 256, 8192) > 1.2 * time(256 * 54, 256, 8192)
    assert seconds([Kernels(moved=1e9)], gpu) == pytest.approx(1e9 / 1.63e12, rel=0.02)


def test_groups_that_leave_a_node_share_its_network() -> None:
    gpu = hardware_of("a100-80gb")
    inside = all_reduce(1e8, (8, 1), gpu)
    assert all_reduce(1e8, (8, 8), gpu) > 5 * inside
    assert all_reduce(1e8, (16, 2), gpu) < all_reduce(1e8, (16, 8), gpu)
    rings = replace(gpu, rings=True)
    assert all_reduce(0.0, (8, 1), gpu) == pytest.approx(6 * gpu.link_latency)
    assert all_reduce(0.0, (8, 1), rings) == pytest.approx(14 * gpu.link_latency)
    mesh = MeshConfig(tensor=2, pipeline=4, data=8)
    assert group_span(mesh, "data") == (8, 2) and group_span(mesh, "pipeline") == (4, 16)


def test_attention_works_on_the_masks_pairs() -> None:
    config = PriorConfig(dim=64, heads=1, layers=4, text_length=256, grid=32)
    exact, tiled = pairs(config, "column", False), pairs(config, "column", True)
    assert exact == 256 * 257 // 2 + 1024 * 256 + 32 * 33 * 16
    assert exact < tiled < 0.5 * config.length**2


def test_fewer_resources_never_make_it_faster() -> None:
    gpu = hardware_of("h100")
    settings = replace(settings_of("paper_2_8b"), compress=CompressConfig())
    base = estimate(settings, gpu)
    assert sum(base.parts.values()) == pytest.approx(base.seconds)
    for change in ({"network": gpu.network / 4}, {"bandwidth": gpu.bandwidth / 2}):
        assert estimate(settings, replace(gpu, **change)).seconds > base.seconds
    assert base.days == pytest.approx(base.seconds * 430_000 / 86_400)


def test_what_does_not_fit_says_why() -> None:
    plain = replace(settings_of("paper_12b"), mesh=MeshConfig(data=1024), engine=EngineConfig())
    verdict = weigh(replace(plain, compress=CompressConfig()), 1024, hardware_of("h100"))
    assert "80" not in verdict.why and "79.4 GB of h100" in verdict.why
    assert verdict.bytes_["optimizer"] == 8 * count_parameters(plain.model)
    odd = replace(TINY, mesh=MeshConfig(data=3), engine=EngineConfig())
    assert "3 replicas" in weigh(odd, 3, hardware_of("h100")).why


def test_starting_takes_host_memory_and_may_be_too_much() -> None:
    """ZeRO-2 of 12B flattens its weights on the host if an 80 GB GPU cannot hold them twice: twice
    49 GB a rank. Plain replicas build a layer at a time, ZeRO-3 64 rows of it."""
    plain = replace(settings_of("paper_12b"), compress=CompressConfig())
    gpu = hardware_of("h100")

    def start(stage: int, memory: float = gpu.memory, host: float = gpu.host_memory) -> Candidate:
        settings = replace(
            plain,
            mesh=MeshConfig(data=1024),
            engine=EngineConfig(
                name="deepspeed_zero", zero_stage=stage, precision="bf16", recompute=True
            ),
        )
        return weigh(settings, 1024, replace(gpu, memory=memory, host_memory=host))

    weights = 4 * count_parameters(plain.model)
    second = start(2)
    assert second.start is not None and second.start.ranks == 8
    assert second.start.host == pytest.approx(2 * weights, rel=0.001) and not second.why
    assert second.start.node == 8 * (PROCESS + second.start.host)
    why = start(2, host=500e9).why
    assert "806.5 GB of host memory a node, 8 ranks of 100.8 GB" in why and "500.0 GB" in why
    larger = start(2, memory=140e9, host=500e9)
    assert larger.start is not None and larger.start.device == pytest.approx(2 * weights, rel=0.001)
    assert not larger.why and larger.start.host < 1e9
    third = start(3, host=500e9)
    assert third.start is not None and third.start.host < 5e6 and not third.why


def test_nccl_takes_memory_of_every_group_and_neighbour() -> None:
    gpu = hardware_of("a100-80gb")

    def taken(mesh: MeshConfig, name: EngineName) -> int:
        return nccl_bytes(replace(TINY, mesh=mesh, engine=EngineConfig(name=name)), gpu)[NCCL]

    one = taken(MeshConfig(data=8), "reference")
    assert one == pytest.approx(688 * 2**20, rel=0.02), "as NVIDIA/nccl issue 964 measured it"
    assert taken(MeshConfig(), "reference") == 0 == taken_on_cpus()
    assert taken(MeshConfig(data=8), "deepspeed_zero") == 2 * one
    stages = [taken(MeshConfig(pipeline=n), "deepspeed_pipe") for n in (2, 3, 4)]
    ring = 24 * 12 * 2**20  # two groups and one neighbour, then two
    assert stages == [2 * one + 3 * ring, 2 * one + 4 * ring, 2 * one + 4 * ring]


def taken_on_cpus() -> int:
    settings = replace(TINY, mesh=MeshConfig(data=8), engine=EngineConfig())
    return nccl_bytes(settings, hardware_of("cpu"))[NCCL]


def test_a_small_model_is_planned_on_one_and_on_eight() -> None:
    """One rank has only the reference engine; eight have faster meshes."""
    one, eight = (search(TINY, world, hardware_of("cpu")) for world in (1, 8))
    assert [row.candidate.settings.engine.name for row in one.timed] == ["reference"]
    assert len(eight.timed) > 5
    order = [row.estimate.seconds for row in eight.timed]
    assert order == sorted(order)


def test_wrong_hardware_and_calibrations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"known: .*v100-16gb"):
        hardware_of("tpu")
    (tmp_path / "c.json").write_text('{"speed": 3}')
    with pytest.raises(InputError, match="--calibrate"):
        hardware_of("cpu", tmp_path / "c.json")
    whole = dict.fromkeys(MEASURED, 3e11) | {"sustained": 0.5}
    (tmp_path / "c.json").write_text(json.dumps(whole))
    assert hardware_of("cpu", tmp_path / "c.json").half_flops == 3e11
    (tmp_path / "c.json").write_text('{"half_flops": 3e11}')
    with pytest.raises(InputError, match=r"full_flops is missing; .*sustained is missing"):
        hardware_of("cpu", tmp_path / "c.json")
    assert hardware_of("v100").name == "v100-16gb"


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"half_flops": "fast", "cores": "2"}, "half_flops='fast' must.*cores='2' must"),
        ({"half_flops": None}, "half_flops=None must be a number"),
        ({"half_flops": 0}, "half_flops=0 must be a positive"),
        ({"half_flops": -1e12, "launch": -1}, "half_flops.*positive.*launch=-1"),
        ({"half_flops": 10**400}, "positive"),
        ({"memory": float("nan")}, "memory=nan"),
        ({"sustained": 1.5}, "fraction"),
        ({"memory": 1e8}, "leaves nothing"),
    ],
)
def test_impossible_constants_are_refused(
    constants: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(constants))
    with pytest.raises(InputError, match=words):
        hardware_of("cpu", path)
    assert all(not gpu.problems() for gpu in KNOWN.values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            [
                "--network=-5",
                "--gpus-per-node=-2",
                "--link=inf",
                "--memory=nan",
                "--cost-per-hour=nan",
            ],
            5,
        ),
        (["--world=-1", "--batch=-4"], 2),
        ([f"--world={10**26}", f"--batch={10**12}", "--picture=plan.gif"], 3),
        (["--batch=12"], "not a multiple of the preset's order.lanes=8; try 16"),
        (["--memory=inf"], 1),
        (["--memory=0.5"], "leaves nothing"),
        (["--calibration=c.json"], "add --gpu cpu"),
        (["--published"], "no use for preset"),
        (["--calibrate=c.json", "--gpu=cpu"], "no use for preset, gpu"),
        (["--calibrate=c.json", "--published"], "two commands"),
        (["--gpu=tpu"], "known: .*v100-16gb"),
    ],
)
def test_wrong_flags_are_refused_at_once(
    flags: list[str], words: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planning.plan.search", None)  # nothing is looked for
    with pytest.raises(ConfigError, match=words if isinstance(words, str) else "-") as caught:
        plan(["tiny", *flags])
    if isinstance(words, int):
        assert len(str(caught.value).splitlines()) == words


@pytest.mark.parametrize("flag", ["--picture", "--calibrate"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planning.plan.search", None)
    (tmp_path / "folder.svg").mkdir()
    for path in (tmp_path / "folder.svg", "/proc/plan.svg"):
        with pytest.raises(OSError, match=r"folder|No such file|Permission"):
            plan([*(["tiny"] if flag == "--picture" else []), f"{flag}={path}"])


def test_large_batches_are_dealt_out_in_powers_of_two() -> None:
    large = replace(
        TINY, loop=replace(TINY.loop, global_batch_size=3 * 2**28), mesh=MeshConfig(data=2)
    )
    large = replace(large, engine=EngineConfig())
    counts = {layout.engine.gradient_accumulation_steps for layout in variants_of(large)}
    assert counts == {3 * 2**28 // 2 // 2**i for i in range(28)}
    layout = replace(large, engine=EngineConfig(gradient_accumulation_steps=2 * MOST_MICRO))
    assert "give a smaller --batch" in weigh(layout, 2, hardware_of("h100")).why


def test_advice_names_what_a_plan_has() -> None:
    plans = search(TINY, 12, hardware_of("h100"))
    assert plans.rejected and not any("--order" in row.why for row in plans.rejected)
    tensors = {row.candidate.settings.mesh.tensor for row in plans.timed}
    tensors |= {row.settings.mesh.tensor for row in plans.rejected}
    assert max(tensors) <= TINY.model.heads


def test_a_model_that_fits_nowhere_ends_in_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        plan(["tiny", "--world=1", "--memory=0.6015", "--json"])
    text = capsys.readouterr().out
    assert ended.value.code == 1 and not json.loads(text.splitlines()[-1])["fits"]
    assert "1.5 MB of h100 can be used" in text and "MB of the fullest rank" in text
    with pytest.raises(SystemExit):
        plan(["tiny", "--world=7"])
    assert "of the fullest rank" not in capsys.readouterr().out


@pytest.mark.parametrize("gpu", ["cpu", "h100"])
def test_the_pictures_timeline_is_the_whole_step(gpu: str) -> None:
    from planning.picture import ending

    mesh = MeshConfig(data=2, pipeline=2)
    engine = EngineConfig(name="deepspeed_pipe", gradient_accumulation_steps=4)
    step = estimate(replace(TINY, mesh=mesh, engine=engine), hardware_of(gpu))
    bars = ending(step)
    assert "overhead" in [name for name, _, _ in bars]
    assert ("crowding" in step.parts) == (gpu == "cpu")
    assert bars[-1][1] + bars[-1][2] == pytest.approx(step.seconds)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_sizes_are_printed_in_readable_units() -> None:
    texts = [size_text(count) for count in (500, 48.3e6, 12.34e9, 2e12)]
    assert texts == ["0.5 kB", "48.3 MB", "12.3 GB", "2.0 TB"]
    assert memory_unit(5e12) == (1e9, "GB") and memory_unit(5e7) == (1e6, "MB")


@pytest.mark.world
def test_the_papers_model_on_the_papers_machines(tmp_path: Path) -> None:
    """1024 V100-16GB: TP x PP with ZeRO-1 fits; plain data parallelism and the paper's layout with
    fp32 Adam do not. The bytes with the paper's 16-bit moments are reported beside it.
    """
    picture = tmp_path / "plan.svg"
    flags = ["--world", "1024", "--gpu", "v100-16gb", "--json", "--picture", str(picture)]
    printed = tapir("plan", "paper_12b", *flags).splitlines()
    result = json.loads(next(line for line in printed if line.startswith("{")))
    assert result["fits"] and result["parameters"] == 12_292_587_008
    best = result["best"]
    assert best["mesh"]["tensor"] > 1 and best["mesh"]["pipeline"] > 1 and best["zero_stage"] == 1
    assert best["total_bytes"] < 16e9 and 0 < best["mfu"] < 1 and best["days"] > 0
    rows = {row["layout"]: row for row in result["rejected"]}
    plain = rows["plain data parallelism"]
    assert plain["bytes"]["parameters"] == 4 * result["parameters"] and "GB" in plain["why"]
    paper = rows["paper: ZeRO-3 in 128 nodes of 8"]
    assert paper["published"]["mixed_fp32_adam"] == pytest.approx(24.6e9, rel=0.01)
    assert paper["published"]["paper_16_bit"] == pytest.approx(12.3e9, rel=0.01)
    assert paper["total_bytes"] > 24.6e9
    assert picture.read_text().startswith("<?xml")


def test_an_unknown_preset_is_named() -> None:
    assert "paper_12b" in tapir("plan", "paper_13b", code=2)


def test_orthogonalisation_is_priced_as_it_runs() -> None:
    """CholeskyQR2 on GPUs: two Gram matrices and two solves in fp64; Householder on CPUs."""
    settings = replace(settings_of("paper_12b"), compress=CompressConfig(rank=896))
    loads = loads_of(settings, RankCoordinates(stage=3))
    shards = list(factored(settings, loads.held, loads.at))
    products = sum(6.0 * s.rows * s.columns * s.rank for s in shards)
    on_gpu, on_cpu = (
        flops(compression_work(loads, hardware_of(name))) - products for name in ("h100", "cpu")
    )
    passes = [8.0 * min(s.rows, s.columns) * s.rank**2 for s in shards]
    assert on_gpu == pytest.approx(2 * sum(passes))
    assert on_cpu == pytest.approx(sum(passes) / (2 * 0.4), 1e-3)
