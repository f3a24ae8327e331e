"""A rehearsal passes matching collectives, and names call, ranks and line of a mismatch."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import core.log
from cli.rehearse import rehearse_verb
from core.errors import EXIT_WRONG_INPUT, ConfigError, TapirError
from data_pipeline.config import OrderConfig
from models.config import DVAEConfig, LoraConfig, PriorConfig
from parallel.config import EngineConfig, MeshConfig, OptimConfig
from parallel.device import CPU
from planning.config import filled
from planning.rehearsal.explain import Mismatch, explain
from planning.rehearsal.matcher import Outcome, Roles, play
from planning.rehearsal.pool import Pool
from planning.rehearsal.rank import RankTask, run_rank
from planning.rehearsal.rehearse import rehearse, roles_of, scaled
from planning.rehearsal.sequence import CollectiveCall, Grid, Sequence
from planning.rehearse_presets import laid_out
from training.config import DVAETrain, LoopConfig, PriorTrain
from training.presets import PRESETS
from training.tasks.dvae_config import DiscriminatorConfig, PerceptualConfig

MODEL = PriorConfig(
    dim=48, heads=6, layers=2, text_length=6, text_vocabulary=50, image_vocabulary=30, grid=4
)
TENSOR = PriorTrain(
    model=MODEL,
    mesh=MeshConfig(tensor=2, data=2),
    engine=EngineConfig(name="deepspeed_zero"),
    loop=LoopConfig(global_batch_size=16),
    optim=OptimConfig(clip_norm=0.5),
)
PIPE = replace(
    TENSOR,
    mesh=MeshConfig(pipeline=2, data=2),
    engine=EngineConfig(name="deepspeed_pipe", gradient_accumulation_steps=4),
)
ODD = 3
"""The rank that a fault is planted in."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One process with all engines imported, for all cases."""
    with Pool() as running:
        yield running


def skips_a_collective(task: RankTask, broker: Any) -> Sequence:
    """One rank omits the all-reduce of one row-parallel layer."""
    from parallel.tensor.megatron import MegatronTensorParallel as Group

    leave, calls = Group.leave, []

    def sometimes(self: Any, x: Any) -> Any:
        calls.append(x)
        return x if len(calls) == 3 else leave(self, x)

    if task.rank == ODD:
        Group.leave = sometimes  # type: ignore[method-assign]
    return run_rank(task, broker)


def sends_another_size(task: RankTask, broker: Any) -> Sequence:
    """A rank has one sample more than its peer."""
    if task.rank == ODD:
        loop = replace(task.settings.loop, global_batch_size=20)
        task = replace(task, settings=replace(task.settings, loop=loop))
    return run_rank(task, broker)


def uses_another_group(task: RankTask, broker: Any) -> Sequence:
    """One rank averages the norm over its replicas only."""
    from parallel.engines.deepspeed import engine

    decide = engine.decide_update

    def of_replicas(squares: Any, mesh: Any, *rest: Any) -> Any:
        world = replace(mesh.world, group=mesh.data.handle)
        return decide(squares, replace(mesh, world=world), *rest)

    if task.rank == ODD:
        engine.decide_update = of_replicas
    return run_rank(task, broker)


def goes_in_another_order(task: RankTask, broker: Any) -> Sequence:
    """A rank computes the image loss first."""
    import models.prior as prior

    loss = prior.prior_loss

    def image_first(logits: Any, batch: Any, text_weight: float) -> Any:
        turned = replace(logits, text=logits.image, image=logits.text)
        losses = loss(turned, {"text": batch["image"], "image": batch["text"]}, 1 - text_weight)
        return {**losses, "text_loss": losses["image_loss"], "image_loss": losses["text_loss"]}

    if task.rank == ODD:
        prior.prior_loss = image_first
    return run_rank(task, broker)


def misses_a_message(task: RankTask, broker: Any) -> Sequence:
    """A stage forgets to send one gradient back."""
    from deepspeed.runtime.pipe import p2p

    send, calls = p2p.send, []

    def sometimes(tensor: Any, stage: int, *rest: Any) -> Any:
        calls.append(stage)
        return None if len(calls) == 3 else send(tensor, stage, *rest)

    if task.rank == ODD:
        p2p.send = sometimes
    return run_rank(task, broker)


def averages_on_the_host(task: RankTask, broker: Any) -> Sequence:
    """One rank leaves its validation figures on the host."""
    return run_rank(task, broker) if task.rank != ODD else all_average_on_the_host(task, broker)


def all_average_on_the_host(task: RankTask, broker: Any) -> Sequence:
    """All ranks leave their validation figures on the host."""
    from parallel.world import World

    mean = World.mean
    World.mean = lambda self, values: mean(replace(self, device=CPU), values)  # type: ignore
    return run_rank(task, broker)


def waits_on_the_host(task: RankTask, broker: Any) -> Sequence:
    """The stages without losses receive those of the last stage in a host tensor."""
    from parallel.engines.deepspeed import engine, pipe

    means = engine.mean_losses

    def without_device(seen: Any, names: Any, mesh: Any) -> Any:
        world = mesh.world if seen else replace(mesh.world, device=CPU)
        return means(seen, names, replace(mesh, world=world))

    engine.mean_losses = pipe.mean_losses = without_device
    return run_rank(task, broker)


FAULTS = {
    "skipped call": (skips_a_collective, TENSOR, "all_reduce over ranks 2, 3", "models/prior.py"),
    "another size": (sends_another_size, TENSOR, "all_reduce over ranks 2, 3", "models/prior.py"),
    "another group": (uses_another_group, TENSOR, "all_reduce over ranks 1, 3", "decide_update"),
    "another order": (goes_in_another_order, TENSOR, "all_reduce over ranks 2, 3", "cross_entropy"),
    "missing message": (misses_a_message, PIPE, "recv from rank 3", "_exec_recv_grads"),
    "another device": (
        averages_on_the_host,
        TENSOR,
        "all_reduce over ranks 0, 1, 2, 3",
        "validation.py",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_detected_and_located(kind: str, pool: Pool) -> None:
    runner, settings, operation, place = FAULTS[kind]
    mismatch = rehearse("planted", "prior", settings, pool, runner).mismatch
    assert mismatch is not None and mismatch.kind == kind, mismatch and mismatch.report()
    named = [side for side in mismatch.sides if side.operation == operation]
    assert named, mismatch.report()
    assert any(place in line for side in named for line in side.places), mismatch.report()
    assert ODD in [side.rank for side in mismatch.sides], mismatch.report()
    assert mismatch.hint and mismatch.waiting


TORCH = replace(TENSOR, mesh=MeshConfig(data=4, nodes=2), engine=EngineConfig(name="torch"))
"""Two machines of two ranks on torch's own stack."""


def leaves_out_a_bucket(task: RankTask, broker: Any) -> Sequence:
    """One rank does not reduce one layer between machines."""
    from parallel.engines.fsdp.buckets import Buckets

    start, calls = Buckets._start, []

    def sometimes(self: Any, unit: Any, known: Any) -> None:
        calls.append(unit)
        if len(calls) != 2:
            start(self, unit, known)

    if task.rank == ODD:
        Buckets._start = sometimes  # type: ignore[method-assign]
    return run_rank(task, broker)


def sends_part_of_a_bucket(task: RankTask, broker: Any) -> Sequence:
    """One rank leaves out one element of each layer's gradient."""
    from parallel.engines.fsdp.buckets import Buckets

    start = Buckets._start

    def shorter(self: Any, unit: Any, known: Any) -> None:
        known.flat = known.flat[1:]
        start(self, unit, known)

    if task.rank == ODD:
        Buckets._start = shorter  # type: ignore[method-assign]
    return run_rank(task, broker)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "kind", "operation"),
    [
        (leaves_out_a_bucket, "skipped call", "all_reduce over ranks 0, 2"),
        (sends_part_of_a_bucket, "another size", "all_reduce over ranks 1, 3"),
    ],
)
def test_a_fault_planted_in_engine_torch_is_located(
    runner: Any, kind: str, operation: str, pool: Pool
) -> None:
    mismatch = rehearse("planted", "prior", TORCH, pool, runner).mismatch
    assert mismatch is not None and mismatch.kind == kind, mismatch and mismatch.report()
    named = [side for side in mismatch.sides if side.operation == operation]
    assert named, mismatch.report()
    assert any("buckets.py" in line for side in named for line in side.places), mismatch.report()


@pytest.mark.slow
def test_a_stage_that_waits_on_the_host_for_a_gpu_tensor_is_reported(pool: Pool) -> None:
    """The last stage broadcasts with nccl, the others wait in gloo: every step hangs."""
    mismatch = rehearse("planted", "prior", PIPE, pool, waits_on_the_host).mismatch
    assert mismatch is not None and mismatch.kind == "another device", (
        mismatch and mismatch.report()
    )
    assert {side.role.split(",")[0] for side in mismatch.sides} == {"stage 0 of 2", "stage 1 of 2"}
    assert all("mean_losses" in side.places[0] for side in mismatch.sides), mismatch.report()
    sizes = sorted(side.size for side in mismatch.sides)
    assert sizes == [f"12 bytes of float32 on {p}" for p in ("cpu (gloo)", "cuda (nccl)")]
    assert "each waits for ever" in mismatch.text and "mesh.world.device" in mismatch.hint


@pytest.mark.slow
def test_a_host_tensor_on_all_ranks_is_reported(pool: Pool) -> None:
    mismatch = rehearse("planted", "prior", TENSOR, pool, all_average_on_the_host).mismatch
    assert mismatch is not None and mismatch.kind == "host tensor", mismatch and mismatch.report()
    assert "validation.py" in mismatch.report() and "on cpu (gloo)" in mismatch.report()


@pytest.mark.seconds
def test_too_few_validation_samples_fail_the_first_validation(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core.log, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(core.log.LOG, "propagate", True)
    caplog.set_level("INFO", core.log.LOG.name)
    loop, order = replace(TENSOR.loop, validation_samples=512), OrderConfig(lanes=1024)
    settings = replace(TENSOR, loop=loop, order=order)
    mismatch = rehearse("planted", "prior", settings, pool).mismatch
    assert mismatch is not None and mismatch.kind == "failed"
    assert "has 512 pairs" in mismatch.text and "order.lanes=1024" in mismatch.text
    assert "ranks make their groups and steps: for" in caplog.text, "a slow rehearsal says so"


def test_presets_with_too_few_validation_samples_are_named() -> None:
    pairs = [("prior", name) for name in PRESETS["prior"]]
    rehearsed, refused = laid_out(pairs, ["--loop.validation-samples=512"], 1024)
    paper = {f"prior {name}" for name in PRESETS["prior"] if name.startswith("paper")}
    assert paper <= set(refused) and len(rehearsed) == len(pairs) - len(refused)
    assert all("validation_samples=512" in refused[name] for name in paper)


@pytest.mark.world
@pytest.mark.parametrize("settings", [TENSOR, TORCH, replace(PIPE, grow=True)])
def test_what_matches_passes(settings: PriorTrain, pool: Pool) -> None:
    result = rehearse("as it is", "prior", settings, pool)
    assert result.matches, result.mismatch and result.mismatch.report()
    assert result.operations > 150 and set(result.backends) == {"gloo", "nccl"}


OPTIONS: dict[str, Any] = {
    "norm": "rms",
    "qk_norm": True,
    "positions": "rotary",
    "mlp": "gated",
    "columns": 5,
}
CHOSEN = {
    "options, tied": replace(PIPE, model=replace(MODEL, **OPTIONS, tied=True)),
    "options, adapters": replace(
        TENSOR, model=replace(MODEL, **OPTIONS), lora=LoraConfig(rank=2), init="base"
    ),
    "frozen": replace(TENSOR, freeze="embedding|block000"),
    **{
        f"dvae, {quantizer}, all losses": DVAETrain(
            model=DVAEConfig(pixels=32, width=4, code_width=8, quantizer=quantizer),
            perceptual=PerceptualConfig(weight=1.0, vgg=Path("vgg16.pth")),
            discriminator=DiscriminatorConfig(weight=0.1, width=8, layers=2),
            mesh=MeshConfig(data=2),
            engine=EngineConfig(name="deepspeed_zero"),
            loop=LoopConfig(global_batch_size=16, validation_samples=64),
        )
        for quantizer in get_args(get_type_hints(DVAEConfig)["quantizer"])[1:]
    },
}
"""Settings that differ from the paper's network, on 2 or 4 ranks."""


@pytest.mark.world
@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_chosen_beside_the_paper_matches(name: str, pool: Pool) -> None:
    settings = CHOSEN[name]
    assert settings.problems() == []
    result = rehearse(name, "dvae" if "dvae" in name else "prior", settings, pool)
    assert result.matches, result.mismatch and result.mismatch.report()
    assert result.operations > 40 and set(result.backends) == {"gloo", "nccl"}


@pytest.mark.slow
def test_texts_of_all_ranks_are_gathered_in_large_worlds(pool: Pool) -> None:
    ((_, _, settings),), _ = laid_out([("dvae", "tiny")], [], 5000)
    result = rehearse("large", "dvae", settings, pool)
    assert result.matches, result.mismatch and result.mismatch.report()


@pytest.mark.world
def test_a_rank_that_fails_is_reported_with_its_error(pool: Pool) -> None:
    mismatch = rehearse("failing", "prior", TENSOR, pool, fails).mismatch
    assert mismatch is not None and mismatch.kind == "failed"
    assert "rank 3" in mismatch.text and "ValueError: planted" in mismatch.text


def fails(task: RankTask, broker: Any) -> Sequence:
    """The loss of one rank raises."""
    import models.prior as prior

    def loss(*_: Any, **__: Any) -> Any:
        raise ValueError("planted")

    if task.rank == ODD:
        prior.prior_loss = loss
    return run_rank(task, broker)


@pytest.mark.world
def test_the_verb_says_so_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    rehearse_verb(["tiny", "--world", "16", "--engine.zero-stage=2", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "1 micro-batch a step" in lines[0] and " TB" not in lines[-1]
    assert result["matches"] and result["mismatch"] is None
    assert result["mesh"]["data"] == 16 and result["batch"] == 256
    assert result["roles"] == 3 and result["calls"]["all_reduce"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papr_12b"], "did you mean 'paper_12b'"),
        (["tiny", "--world", "no"], "not a positive whole number"),
        (["tiny", "--stage", "bpe"], "no stage 'bpe'"),
        (["tiny", "--device", "tpu"], "neither cuda nor cpu"),
        (["paper_12b", "--world", "1000"], "try --world 992"),
        (["tiny", "--world", "1"], "deepspeed_zero needs at least 2 ranks"),
        (["tiny", "--world", "²"], "not a positive whole number"),
        (["tiny", "--world", "9" * 5000], "not a positive whole number"),
        (["tiny", "--mesh.tensor", "0"], "prior tiny cannot.*\n- mesh.data, tensor"),
        (["tiny", "--world", "4", "--mesh.data", "0", "--mesh.tensor", "2"], "mesh.data, tensor"),
        (
            ["tiny", "--world", "4", "--engine.gradient-accumulation-steps", "0"],
            "engine.gradient_accumulation_steps=0 does not",
        ),
        (
            ["tiny", "--engine.gradient-accumulation-steps", "1000"],
            "steps=1000 does not divide the 16",
        ),
        (["tiny", "--loop.global-batch-size", "0"], "loop.global_batch_size=0 must be at least 1"),
        (["tiny", "--loop.global-batch-size", "-4"], "loop.global_batch_size=-4"),
        (["tiny", "--loop.global-batch-size", "2"], "loop.global_batch_size=2"),
        (["tiny", "--engine.zero-stage", "3", "--mesh.nodes", "3"], "nodes=3 does not"),
        (["tiny", "--mesh.nodes", "0"], "nodes must be at least 1"),
        (["tiny", "--order.lanes", "0"], "order.lanes and order.shuffle_buffer"),
        (["tiny", "--order.lanes", "0", "--mesh.tensor", "0"], "(?s)mesh.data.*order.lanes and"),
    ],
)
def test_wrong_input_ends_in_exit_code_2(arguments: list[str], message: str) -> None:
    with pytest.raises(TapirError, match=message) as caught:
        rehearse_verb(arguments)
    assert caught.value.exit_code == EXIT_WRONG_INPUT


def test_all_goes_on_past_presets_that_cannot_be_laid_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = [("prior", name) for name in PRESETS["prior"]]
    rehearsed, refused = laid_out(pairs, [], 8)
    assert ("prior", "tiny") in [row[:2] for row in rehearsed]
    assert "not a multiple of the 16" in refused["prior paper_12b"]
    with pytest.raises(SystemExit) as ended:
        rehearse_verb(["all", "--stage=dvae", "--order.lanes=0", "--json"])
    assert ended.value.code == EXIT_WRONG_INPUT
    result = json.loads(capsys.readouterr().out)
    assert set(result["refused"]) == {f"dvae {name}" for name in PRESETS["dvae"]}


def test_presets_grow_with_the_world() -> None:
    for stage in ("dvae", "prior", "clip"):
        for name, preset in PRESETS[stage].items():
            grown = filled(name, scaled(preset(), 1024))
            assert not grown.problems(1024), (stage, name)
    kept = scaled(PRESETS["prior"]["paper_2_8b"](), 1024)
    assert (
        kept.mesh.data,
        kept.loop.global_batch_size,
        kept.engine.gradient_accumulation_steps,
    ) == (256, 1024, 4)
    grown = scaled(PRESETS["dvae"]["paper_dvae"](), 1024)
    assert (grown.loop.global_batch_size, grown.engine.gradient_accumulation_steps) == (8 * 1024, 1)
    with pytest.raises(ConfigError, match="not a multiple of the 16"):
        scaled(PRESETS["prior"]["paper_12b"](), 1000)


def test_roles_stand_for_all_ranks() -> None:
    mesh = MeshConfig(tensor=2, pipeline=8, data=64)
    ranks = roles_of(mesh)
    assert len(ranks) == 8 * 2 * 2
    roles, grid = Roles(Grid(mesh), ranks), Grid(mesh)
    assert {roles.of(rank) for rank in range(1024)} == set(ranks)
    assert all(roles.of(rank) == rank for rank in ranks)
    assert grid.coordinates(roles.of(grid.rank((5, 0, 40, 1)))) == (5, 0, 63, 1)
    assert roles_of(MeshConfig(data=64, nodes=8)) == [0, 1, 7, 8, 9, 15, 56, 57, 63]


MESH = MeshConfig(pipeline=2, data=2)
"""Ranks 0 and 1 are the first stage, 2 and 3 the second."""


def _sum(*group: int, size: int = 8) -> CollectiveCall:
    return CollectiveCall(kind="all_reduce", group=group, bytes=size, dtype="float32")


def _message(kind: str, other: int, size: int = 8) -> CollectiveCall:
    return CollectiveCall(kind=kind, group=(other,), bytes=size, dtype="float32")


def _played(*queues: list[CollectiveCall]) -> tuple[Outcome, Mismatch | None]:
    sequences = {i: Sequence(rank=i, operations=queue) for i, queue in enumerate(queues)}
    roles = Roles(Grid(MESH), range(4))
    outcome = play(roles, sequences)
    return outcome, explain(roles, sequences, outcome)


def test_stages_that_both_send_first_wait_for_each_other() -> None:
    first = [[_message("send", i + 2), _message("recv", i + 2)] for i in (0, 1)]
    second = [[_message("send", i), _message("recv", i)] for i in (0, 1)]
    outcome, mismatch = _played(*first, *second)
    assert len(outcome.stuck) == 4 and mismatch is not None and mismatch.kind == "deadlock"
    turned = [queue[::-1] for queue in second]
    outcome, mismatch = _played(*first, *turned)
    assert outcome.whole and mismatch is None and outcome.operations == 8


def _pair(first: list[tuple[str, int]], second: list[tuple[str, int]]) -> Any:
    """Both replicas of each stage make the calls (kind, bytes) with the other stage."""
    queues = [[_message(kind, i + 2, size) for kind, size in first] for i in (0, 1)]
    queues += [[_message(kind, i, size) for kind, size in second] for i in (0, 1)]
    return _played(*queues)


def test_who_posts_a_message_goes_on() -> None:
    """The steady state of 1F1B, which would stand still if a send blocked."""
    for i, stands in (("", 4), ("i", 0)):
        warm, steady = f"{i}send", [(f"{i}send", 8), (f"{i}recv", 8)]
        outcome, mismatch = _pair([(warm, 8), *steady], [(f"{i}recv", 8), *steady])
        assert len(outcome.stuck) == stands and (mismatch is None) == (not stands)
    assert outcome.operations == 12 and outcome.bytes == 12 * 8


def test_posted_messages_arrive_in_order_and_all_are_received() -> None:
    outcome, mismatch = _pair([("isend", 8), ("send", 4)], [("irecv", 8), ("recv", 4)])
    assert outcome.whole and mismatch is None
    for waits in ([("irecv", 4), ("recv", 8)], [("recv", 4)]):
        _, mismatch = _pair([("isend", 8), ("send", 4)], waits)
        assert mismatch is not None and mismatch.kind == "another size", mismatch.report()
    _, mismatch = _pair([("isend", 8), ("isend", 8)], [("irecv", 8)])
    assert mismatch is not None and mismatch.kind == "missing message", mismatch.report()
    assert "has 2 calls of isend for rank 2, which has 1 of irecv" in mismatch.report()


def test_a_message_that_a_whole_stage_forgets_is_counted() -> None:
    first = [[_message("send", i + 2)] for i in (0, 1)]
    second = [[_message("recv", i)] * 2 for i in (0, 1)]
    _, mismatch = _played(*first, *second)
    assert mismatch is not None and mismatch.kind == "missing message"
    assert "rank 2 has 2 calls of recv for rank 0, which has 1 of send" in mismatch.text


def test_sizes_of_messages_and_of_groups_over_stages_are_compared() -> None:
    wrong = [_message("recv", 0, 16)], [_message("recv", 1, 16)]
    outcome, mismatch = _played([_message("send", 2)], [_message("send", 3)], *wrong)
    assert outcome.unequal and mismatch is not None and mismatch.kind == "another size"
    outcome, mismatch = _played(
        [_sum(0, 2)], [_sum(1, 3)], [_sum(0, 2, size=4)], [_sum(1, 3, size=4)]
    )
    assert mismatch is not None and mismatch.kind == "another size"
    assert {side.rank for side in mismatch.sides} == {0, 2}
