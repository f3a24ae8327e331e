"""Inputs of a step, computed by hand: rate, temperature, beta, batches, averages, figures."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.format import StateSlice
from core.keys import key_int, keyed_rng
from data_pipeline.formats.raw import RawRecord
from data_pipeline.formats.tokens import TokenRecord
from data_pipeline.images.crops import dvae_crop, square
from data_pipeline.streaming.readable import ReadablePairs
from models.config import DVAEConfig, PriorConfig
from models.counts import step_flops
from models.dvae import DVAE
from parallel.adamw import AdamW, AdamW16
from parallel.config import OptimConfig
from parallel.device import CPU
from parallel.engines.protocol import (
    Engine,
    Layer,
    Program,
    Recomputed,
    StepResult,
    build_adamw,
    parameter_groups,
)
from parallel.ledger import Traffic
from parallel.world import World
from tests.forked import forked_ranks
from training.config import DVAETrain, LoopConfig, PriorTrain
from training.ema import Average
from training.run.feed import StepData
from training.schedules import Plateau, cosine, learning_rate
from training.tasks.clip import _GatherRows, clip_program
from training.tasks.dvae import DVAETask, _rows
from training.tasks.dvae_config import DiscriminatorConfig
from training.tasks.dvae_program import dvae_program
from training.tasks.prior import PriorTask, token_batch
from training.tasks.task import pad_text, perplexity, split_records
from training.trainer import Run


class _Engine:
    """Records its inputs."""

    def __init__(self) -> None:
        self.given: list[tuple[list[Any], float]] = []

    def step(self, micro: list[Any], lr: float, wants_stop: bool) -> StepResult:
        self.given.append((micro, lr))
        return StepResult(losses={"loss": 1.0}, grad_norm=2.0)


def _run(step: int, halved: int, optim: OptimConfig) -> Any:
    """A run with only the attributes that `steps` and `one_step` read."""
    run = object.__new__(Run)
    run.settings = cast(
        Any,
        SimpleNamespace(
            optim=optim,
            loop=LoopConfig(steps=100),
        ),
    )
    run.plateau, run.step, run.engine = Plateau(halved=halved), step, cast(Any, _Engine())
    run._ledger = cast(Any, SimpleNamespace(counted=lambda: nullcontext(Traffic())))
    run._heart = cast(Any, SimpleNamespace(beat=lambda *_: None))
    run.begun = []  # type: ignore[attr-defined]
    run.profile = cast(
        Any,
        SimpleNamespace(phase=lambda _: nullcontext(), begin=run.begun.append),  # type: ignore[attr-defined]
    )
    return run


OPTIM = OptimConfig(lr=8.0, final_lr=2.0, warmup=4, halvings=3)


@pytest.mark.parametrize(
    ("step", "halved", "rate"), [(0, 0, 2.0), (3, 0, 8.0), (4, 0, 8.0), (50, 0, 8.0), (50, 2, 2.0)]
)
def test_a_step_is_made_at_the_halved_rate(step: int, halved: int, rate: float) -> None:
    run = _run(step, halved, OPTIM)
    result = run.one_step([1, 2])
    assert run.engine.given[0][1] == result.facts["lr"] == rate
    assert run.step == step + 1


def test_a_cosine_rate_reaches_the_engine() -> None:
    """Steps 4 to 100; the middle, 52, has the mean of 8 and 2."""
    run = _run(52, 0, replace(OPTIM, halvings=0))
    run.one_step([1])
    assert run.engine.given[0][1] == pytest.approx(5.0)


def test_a_run_steps_to_its_end_and_goes_back_where_it_must() -> None:
    run = _run(97, 0, OPTIM)
    state = SimpleNamespace(epoch=2, step=5, all_versions=())
    told: list[Any] = []
    back = iter([False, True, False, False])

    def must_rewind(result: StepResult, records: Any, at: Any, facts: Any) -> bool:
        told.append((records, facts["step"], facts["position"]))
        return next(back)

    compared: list[int] = []
    run.recovery = SimpleNamespace(
        must_rewind=must_rewind,
        due=lambda step: step == 100,
        compare_replicas=lambda engine, step: compared.append(step),
    )
    run.stage, run.config, run.history = "prior", {}, []
    run.checkpoints = SimpleNamespace(whole="step-1")
    averaged: list[int] = []
    run.average = SimpleNamespace(update=averaged.append)
    run._rewind = lambda: setattr(run, "step", 98)

    asked: list[int] = []

    def data(step: int) -> Iterator[StepData]:
        asked.append(step)
        for i in range(10):
            yield StepData(micro=[{"x": torch.tensor(i)}], records=[i], state=cast(Any, state))

    run.feed = SimpleNamespace(steps=data)
    costs = [cost for _, cost in run.steps()]
    assert averaged == [98, 99, 100] and compared == [100] and run.step == 100
    assert [t[0] for t in told] == [[0], [1], [0], [1]]
    assert run.begun == [98, 99, 99, 100] and asked == [97, 98]
    assert [int(micro[0]["x"]) for micro, _ in run.engine.given] == [0, 1, 0, 1]
    assert told[0][1:] == (98, {"epoch": 2, "step": 4})
    assert len(costs) == 3 and all(0 <= cost.waited <= cost.seconds < 5 for cost in costs)


def test_flops_of_a_step_are_the_priors() -> None:
    config = PriorConfig(
        dim=8, heads=2, layers=2, text_length=3, text_vocabulary=4, image_vocabulary=3, grid=2
    )
    assert step_flops(config, 5) == 5 * 70944
    assert step_flops(DVAEConfig(), 5) == 0.0


def test_a_validation_s_loss_is_that_of_these_weights_alone() -> None:
    run = _run(7, 0, OPTIM)
    run._scored = None
    assert run._loss_now() is None
    run._scored = (7, 1.5)
    assert run._loss_now() == 1.5
    run._scored = (6, 1.5)
    assert run._loss_now() is None


def test_rates_at_the_seams() -> None:
    optim = OptimConfig(lr=1.0, final_lr=0.25, warmup=10, decay_fraction=0.5)
    rates = [learning_rate(optim, step, 100) for step in (0, 9, 10, 30, 50, 51, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.625, 0.25, 0.25, 0.25])
    short = OptimConfig(lr=1.0, final_lr=0.25, warmup=10, decay_fraction=0.1)
    assert [learning_rate(short, step, 100) for step in (10, 11)] == [1.0, 0.25]
    assert learning_rate(OptimConfig(warmup=0, lr=3.0), 0, 9) == 3.0
    assert learning_rate(replace(optim, halvings=1), 40, 100) == 1.0
    assert cosine(4.0, 2.0, -1.0) == 4.0 and cosine(4.0, 2.0, 1 / 3) == pytest.approx(3.5)


def test_a_plateau_at_the_seams() -> None:
    optim = OptimConfig(warmup=10, halvings=2, patience=1, plateau_threshold=0.5)
    plateau = Plateau()
    assert not plateau.observe(optim, 9, 8.0) and plateau.best == math.inf
    assert not plateau.observe(optim, 10, 8.0) and plateau.best == 8.0
    assert plateau.observe(optim, 11, 4.0), "just half is not a gain of half"
    assert plateau.best == 8.0 and plateau.since == 0 and plateau.halved == 1
    assert not plateau.observe(optim, 12, 3.9) and plateau.best == 3.9 and plateau.since == 0
    assert plateau.observe(optim, 12, 3.9) and plateau.halved == 2
    assert not plateau.observe(optim, 12, 3.9) and plateau.since == 0
    assert Plateau(best=2.5).state() == {"best": "2.5", "since": 0, "halved": 0}
    assert Plateau() == Plateau(best=math.inf, since=0, halved=0)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_the_cap_of_the_variance_reaches_the_optimiser(moments: Any) -> None:
    """(1 - 0.96) * 100^2 = 400, capped at 5; without a cap 400 stays."""
    for most, expected in ((5.0, 5.0), (0.0, 400.0)):
        weight = torch.nn.Parameter(torch.ones(2, 2))
        optim = OptimConfig(max_variance=most, moments=moments, beta1=0.5, lr=0.25, eps=1e-3)
        optimizer = build_adamw({"w": weight}, optim)
        assert type(optimizer) is (AdamW if moments == "fp32" else AdamW16)
        weight.grad = torch.full((2, 2), 100.0)
        optimizer.step()
        state = optimizer.state[weight]
        assert state["exp_avg_sq"].flatten().tolist() == pytest.approx([expected] * 4, rel=4e-3)
        assert state["exp_avg"].float().tolist() == [[50.0] * 2] * 2
        # decay 1 - 0.25 * 0.045; step 0.25 * 100 / (sqrt(v / 0.04) + eps)
        root = math.sqrt(expected / 0.04) + 1e-3
        assert weight[0, 0].item() == pytest.approx(1 - 0.01125 - 0.25 * 100 / root, rel=1e-2)
        assert optimizer.param_groups[0]["lr"] == 0.25


def test_matrices_decay_and_the_rest_does_not() -> None:
    shapes: dict[str, tuple[int, ...]] = {"b": (3,), "w": (2, 2), "a": (1, 2), "g": ()}
    names = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    groups = parameter_groups(names, OptimConfig(weight_decay=0.3))
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert [id(p) for p in groups[0]["params"]] == [id(names["a"]), id(names["w"])]
    assert [id(p) for p in groups[1]["params"]] == [id(names["b"]), id(names["g"])]
    assert len(parameter_groups({"b": names["b"]}, OptimConfig())) == 1
    for moments in ("fp32", "bf16"):
        optimizer = build_adamw(names, OptimConfig(moments=moments))  # type: ignore
        count = optimizer.first_state(names["a"])["step"]
        assert count.shape == () and float(count) == 0.0


def test_defaults_of_what_is_trained() -> None:
    def of(kind: type) -> dict[str, object]:
        return {f.name: f.default for f in fields(kind)}

    layer = of(Layer)
    assert (layer["draw"], layer["cost"], layer["branches"]) == (None, 1, ())
    assert of(Program)["compressed"] == ()
    result = StepResult(losses={}, grad_norm=0.0)
    assert (result.skipped, result.stopping) == ("", False)
    assert signature(Engine.step).parameters["wants_stop"].default is False


def test_a_branch_is_recomputed_only_if_gradients_are_needed() -> None:
    layer, calls = Recomputed(), []

    def branch(x: Tensor) -> Tensor:
        calls.append(1)
        return x * x

    x = torch.tensor(3.0, requires_grad=True)
    assert not layer.recompute
    for recompute, grad, times in ((False, True, 1), (True, True, 2), (True, False, 1)):
        layer.recompute = recompute
        calls.clear()
        with torch.set_grad_enabled(grad):
            y = layer.run_branch(branch, x)
            if grad:
                x.grad = None
                y.backward()
                assert x.grad is not None and float(x.grad) == 6.0
        assert len(calls) == times


class _Slices:
    """An engine with one matrix, and a checkpoint of it."""

    def __init__(self) -> None:
        self.data, self.kinds_stored = torch.zeros(3), ["master"]

    def state_slices(self) -> Iterator[StateSlice]:
        for kind in ("exp_avg", "master"):
            data = self.data if kind == "master" else torch.full((3,), 9.0)
            yield StateSlice(name="w", kind=kind, shape=(2, 3), start=3, data=data)
        yield StateSlice(name="still", kind="master", shape=(2,), start=0, data=torch.ones(2))

    def frozen(self) -> frozenset[str]:
        return frozenset({"still"})

    def kinds(self, name: str) -> list[str]:
        return self.kinds_stored

    def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        assert (name, start, stop) == ("w", 3, 6)
        return torch.full((3,), 7.0 if kind == "ema" else 5.0)


def test_an_average_by_hand() -> None:
    """0, then a quarter towards 4, then towards 8: 1, 2.75; steps in between are ignored."""
    engine = _Slices()
    average = Average(cast(Any, engine), OptimConfig(ema=0.75, ema_every=2), CPU)
    for step, value in ((1, 50.0), (2, 4.0), (3, 50.0), (4, 8.0)):
        engine.data = torch.full((3,), value)
        average.update(step)
    (kept,) = average.slices()
    assert kept.data.tolist() == [2.75] * 3
    assert (kept.name, kept.kind, kept.shape, kept.start) == ("w", "ema", (2, 3), 3)
    average.load(cast(Any, engine))
    assert next(iter(average.slices())).data.tolist() == [5.0] * 3
    engine.kinds_stored = ["ema", "master"]
    average.load(cast(Any, engine))
    assert next(iter(average.slices())).data.tolist() == [7.0] * 3
    none = Average(cast(Any, engine), OptimConfig(ema=0.0, ema_every=1), CPU)
    none.update(1)
    none.load(cast(Any, engine))
    assert not list(none.slices()) and not none._mean


def _token(number: int, text: list[int], image: list[int]) -> TokenRecord:
    return TokenRecord(id=number, text=np.array(text, np.uint16), image=np.array(image, np.uint16))


def _prior_task(drop: float) -> PriorTask:
    task = object.__new__(PriorTask)
    task._settings = PriorTrain(caption_dropout=drop, loop=LoopConfig(seed=3))
    task._dropout, task._world = None, World()
    task.model_config = PriorConfig(
        text_length=3, text_vocabulary=9, image_vocabulary=4, grid=2, dim=4, heads=1, layers=1
    )
    return task


def test_token_batches_by_hand() -> None:
    records = [_token(0, [1, 2, 3, 4], [3, 2, 1, 0]), _token(1, [], [1, 1, 1, 1])]
    batch = token_batch(records, 3)
    assert batch["text"].tolist() == [[1, 2, 3], [-1, -1, -1]]
    assert batch["image"].tolist() == [[3, 2, 1, 0], [1, 1, 1, 1]]
    assert batch["text"].dtype == batch["image"].dtype == torch.int64
    assert pad_text([[5]], 2).tolist() == [[5, -1]]


def test_captions_are_dropped_by_key_at_the_rate_and_only_in_training() -> None:
    records = [_token(i, [1, 2], [0, 0, 0, 0]) for i in range(2000)]
    task = _prior_task(0.3)
    text = task.batch(records, 5)["text"]
    share = float((text[:, 0] == -1).float().mean())
    assert 0.26 < share < 0.34, "four deviations of 2,000 draws"
    assert task.batch(records, 5)["text"].equal(text)
    assert not task.batch(records, 6)["text"].equal(text)
    assert (task.batch(records, 5, False)["text"][:, 0] == 1).all()
    assert (_prior_task(0.0).batch(records, 5)["text"][:, 0] == 1).all()
    for i in range(200):
        fraction = key_int(3, 5, i, "caption drop") / 2.0**63
        assert (text[i, 0] == -1) == (fraction < 0.3)


def test_other_segmentations_are_drawn_in_training_alone() -> None:
    task = _prior_task(0.0)
    asked: list[Any] = []

    def again(text: Any, *key: Any) -> Any:
        asked.append(key)
        return np.array([8], np.uint16)

    task._dropout = cast(Any, SimpleNamespace(encode=again))
    records = [_token(17, [1, 2], [0, 0, 0, 0])]
    assert task.batch(records, 4)["text"].tolist() == [[8, -1, -1]]
    assert asked == [(3, 4, 17)]
    assert task.batch(records, 4, False)["text"].tolist() == [[1, 2, -1]]


def test_bounds_of_a_prior_by_hand() -> None:
    """Position 0 has codes 1 and 2 evenly: ln 2; position 1 is always 3: 0; the rest 3 : 1."""
    task = _prior_task(0.0)
    stored = [[1, 3, 0, 0], [2, 3, 0, 0], [1, 3, 0, 2], [2, 3, 1, 0]]
    blocks = [[_token(i, [i], row)] for i, row in enumerate(stored)]
    manifest = SimpleNamespace(figures={})
    task.train = cast(
        Any, SimpleNamespace(sizes=[1] * 4, read=lambda block: blocks[block], manifest=manifest)
    )
    records = [block[0] for block in blocks]
    seen: list[Tensor] = []

    def means(mine: Any, change: Any) -> dict[str, float]:
        for start in (0, 2):
            batch = token_batch(mine[start : start + 2], 3)
            changed = change(batch, start)
            assert changed["image"].equal(batch["image"])
            seen.append(changed["text"][:, 0])
        return {"image_loss": 2.5}

    figures, pictures = task.figures(means, records, records)
    assert pictures == {} and figures["shuffled_caption_loss"] == 2.5
    of_quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures["per_position_entropy"] == pytest.approx((math.log(2) + 2 * of_quarter) / 4)
    manifest.figures["per_position_entropy"] = 0.125  # of the token job: nothing is counted
    blocks.clear()
    assert task.figures(means, records, records)[0]["per_position_entropy"] == 0.125
    del seen[2:]
    others = torch.cat(seen).tolist()
    shift = 1 + key_int(3, "shuffle") % 3
    assert others == [(i - shift) % 4 for i in range(4)] and sorted(others) == [0, 1, 2, 3]
    assert all(a != b for a, b in zip(others, range(4), strict=True))


def test_perplexity_by_hand() -> None:
    assert perplexity(torch.tensor([[0, 1], [2, 3]])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([5, 5, 5])) == pytest.approx(1.0)
    assert perplexity(torch.tensor([0, 0, 0, 1])) == pytest.approx(1.7547654)  # e^0.5623351


def _dvae_task(**flags: Any) -> DVAETask:
    task = object.__new__(DVAETask)
    loop = LoopConfig(steps=1000, seed=11)
    task._settings = DVAETrain(loop=loop, tau_fraction=0.5, beta_fraction=0.2, **flags)
    task._readable, task.train, task.held_out = ReadablePairs(), cast(Any, None), cast(Any, None)
    task.model_config = replace(task._settings.model, pixels=8, groups=2, codebook=16, width=4)
    return task


def _picture(number: int, side: int = 24) -> RawRecord:
    from data_pipeline.images.crops import encode_png

    pixels = keyed_rng(number, "pixels").integers(0, 256, (side, side + 6, 3), np.uint8)
    values = {f.name: None for f in fields(RawRecord)}
    return RawRecord(**{**values, "image": encode_png(pixels), "key": f"p{number}"})  # type: ignore


@pytest.mark.parametrize(
    ("step", "tau", "beta"),
    [(0, 1.0, 0.0), (100, None, 3.3), (200, None, 6.6), (250, 0.53125, 6.6), (500, 1 / 16, 6.6),
     (1000, 1 / 16, 6.6)],
)  # fmt: skip
def test_temperature_and_beta_of_a_step(step: int, tau: float | None, beta: float) -> None:
    batch = _dvae_task().batch([_picture(1), _picture(2)], step)
    if tau is not None:
        assert float(batch["tau"]) == pytest.approx(tau)
    assert float(batch["beta"]) == pytest.approx(beta, abs=1e-6)
    assert batch["keys"].tolist() == [key_int(11, step, f"p{i}", "gumbel") for i in (1, 2)]


def test_losses_of_a_step_beside_the_likelihood() -> None:
    """The dVAE sees its discriminator from a quarter of 1000 steps on; VQ's weight is constant."""
    assert "adversarial" not in _dvae_task().batch([_picture(1)], 250)
    task = _dvae_task(discriminator=DiscriminatorConfig(weight=0.5), commitment=0.75)
    with torch.device("meta"):  # batches are on the CPU
        begun = [task.batch([_picture(1)], step)["adversarial"] for step in (0, 249, 250, 999)]
    assert list(map(float, begun)) == [0.0, 0.0, 1.0, 1.0]
    assert float(task.batch([_picture(1)], 200)["beta"]) == pytest.approx(6.6)
    vq = replace(task._settings.model, quantizer="vq")
    task._settings = replace(task._settings, model=vq)
    assert [float(task.batch([_picture(1)], step)["beta"]) for step in (0, 500)] == [0.75, 0.75]


def test_pictures_of_a_step_are_crops_by_key_and_squares_in_validation() -> None:
    from data_pipeline.images.decode import decode_rgb

    task, record = _dvae_task(), _picture(3)
    image = decode_rgb(record.image, "x")
    expected = dvae_crop(image, 8, keyed_rng(11, 7, "p3", "augment"))
    pixels = task.batch([record], 7)["pixels"]
    assert pixels.shape == (1, 3, 8, 8)
    assert (pixels[0].permute(1, 2, 0) * 255).round().byte().numpy().tolist() == expected.tolist()
    middle = square(image, 8).tolist()
    for batch in (task.batch([record], 7, False), _dvae_task(augment=False).batch([record], 7)):
        assert (batch["pixels"][0].permute(1, 2, 0) * 255).round().byte().tolist() == middle


@torch.no_grad()
def test_figures_of_a_dvae_by_hand() -> None:
    """Every picture has codes 0, 0, 0, 1 and a reconstruction error of 0.1: 20 dB; a perfect one
    counts as 100 dB. 2 codes are used, of 5, or of the 4 that one picture holds.
    """
    task = _dvae_task()
    task.model_config = replace(task.model_config, pixels=4, groups=2, codebook=5)
    task.dvae = DVAE(task.model_config)
    records = [_picture(i, 6) for i in range(3)]
    pixels = task._squares(records, task.held_out)
    calls: list[int] = []

    def tokens(image: Tensor) -> Tensor:
        calls.append(len(image))
        return torch.tensor([0, 0, 0, 1]).expand(len(image), 4)

    def again(codes: Tensor) -> Tensor:
        start = again.at  # type: ignore[attr-defined]
        again.at += len(codes)  # type: ignore[attr-defined]
        return pixels[start : start + len(codes)] + off

    off, again.at = 0.1, 0  # type: ignore[attr-defined]
    task.dvae.tokens, task.dvae.picture = tokens, again  # type: ignore[method-assign]
    figures, pictures = task.figures(cast(Any, None), records, records)
    assert figures["psnr"] == pytest.approx(20.0, rel=1e-4)
    assert (figures["codes_used"], figures["codes_dead"]) == (2.0, 3.0)
    assert figures["perplexity"] == pytest.approx(1.7547654) and figures["codebook_usage"] == 0.4
    assert pictures["codebook"].tolist() == [0, 0, 0, 1] * 3
    assert pictures["reconstructions"].shape == (8, 12, 3) and calls == [3]
    off, again.at = 0.0, 0  # type: ignore[attr-defined]
    figures, _ = task.figures(cast(Any, None), records[:1], records[:1])
    assert figures["psnr"] == pytest.approx(100.0) and figures["codebook_usage"] == 0.5
    rows = _rows(
        torch.zeros(2, 3, 1, 1), torch.tensor([0.5, 2.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    )
    assert rows.tolist() == [[[0] * 3, [0] * 3], [[128] * 3, [255] * 3]]
    program = dvae_program(task.dvae, task.model_config)
    terms = SimpleNamespace(log_likelihood=torch.tensor(-2.0), penalty=torch.tensor(4.0))
    losses = program.loss(
        (terms, {}), {"beta": torch.tensor(3.0)}
    )  # 3 * 16 / 4 = 12 values a token
    assert float(losses["loss"]) == 3.0 and program.losses == ("loss", "log_likelihood", "kl")


def test_pairs_of_all_ranks_are_compared_and_gradients_come_back(tmp_path: Path) -> None:
    """Two ranks with two pairs each against one process with all four.

    The gather's backward is called directly: a fork must not use autograd's engine.
    """
    draws = torch.Generator().manual_seed(5)
    images, texts = torch.randn(2, 4, 3, generator=draws)
    captions = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]])

    def losses(world: World, rows: slice) -> tuple[float, float]:
        program = clip_program(cast(Any, torch.nn.Identity()), world)
        output = (images[rows], texts[rows], torch.tensor(2.0))
        loss = program.loss(output, {"text": captions[rows]})["loss"]
        with torch.no_grad():
            alone = program.loss(output, {"text": captions[rows]})["loss"]
        return float(loss), float(alone)

    def rank(number: int) -> Any:
        world = World(rank=number, size=2, group=dist.group.WORLD, device=CPU)
        mine, ctx = slice(2 * number, 2 * number + 2), SimpleNamespace()
        gathered = _GatherRows.forward(ctx, images[mine], world)
        slope = (1.0 + number) * torch.arange(12.0).view(4, 3)
        back, none = _GatherRows.backward(ctx, slope)
        assert none is None
        return *losses(world, mine), gathered.tolist(), back.tolist()

    whole = losses(World(device=CPU), slice(0, 4))
    parts = forked_ranks(tmp_path, 2, rank)
    assert (parts[0][0] + parts[1][0]) / 2 == pytest.approx(whole[0], rel=1e-5)
    for number, (_, alone, gathered, back) in enumerate(parts):
        rows = slice(2 * number, 2 * number + 2)
        here = losses(World(device=CPU), rows)
        assert alone == pytest.approx(here[1], rel=1e-5), "without gradients a rank is alone"
        assert gathered == images.tolist()
        assert back == (3 * torch.arange(12.0).view(4, 3))[rows].tolist(), "once and twice"


def test_records_are_split_into_consecutive_parts() -> None:
    assert split_records([0, 1, 2, 3, 4, 5], 3) == [[0, 1], [2, 3], [4, 5]]
