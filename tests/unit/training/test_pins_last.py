"""More pins that `make mutants` asked for: ends of ranges, defaults and non-finite numbers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from core.storage.store import FolderStore
from data_pipeline.config import OrderConfig, PackConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw_set import write_split
from data_pipeline.images.crops import prior_crop, square
from data_pipeline.packing.writer import RawWriter
from data_pipeline.sources.pair import make_pair
from data_pipeline.streaming import order
from data_pipeline.streaming.stream import first_records
from data_pipeline.text.dropout import DropoutEncoder
from data_pipeline.tokenize.encode import to_bytes
from generation.sampling import draw as choose
from models import keyed_noise as noise
from models.clip import Clip
from models.code_encoder import CodeReader
from models.config import ClipConfig, DVAEConfig
from models.critics.perceptual import Perceptual
from models.dvae import DVAE
from models.initialization import init_fan_in, init_normal
from models.prior import PriorHead, prior_program
from parallel.adamw import AdamW, AdamW16
from parallel.compress import advisor, orthogonal
from parallel.compress.advisor import measure_link
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.config import OptimConfig
from parallel.device import CPU
from parallel.scales import Branch, Scale
from parallel.tensor.ops import TensorParallel
from tests.forked import forked_ranks
from tests.unit.data_pipeline.test_pins_data import _Fixed, _ramp
from tests.unit.generation.test_pins_generation import _drawable
from tests.unit.models.test_models import CONFIG
from tests.unit.training.test_pins_training import (
    _dvae_task,
    _picture,
    _prior_task,
    _Slices,
    _token,
)
from training.config import DVAETrain, LoopConfig
from training.ema import Average
from training.tasks import dvae as dvae_task
from training.tasks import prior as tasks
from training.tasks.dvae import DVAETask
from training.tasks.dvae_config import PerceptualConfig


def test_symbols_that_are_no_letters_are_never_cut() -> None:
    model = {"vocab": {"a": 0, "12": 1}, "merges": []}
    words = SimpleNamespace(to_str=lambda: json.dumps({"model": model}))
    assert DropoutEncoder(cast(Any, words), 0.0).encode([1, 0]).tolist() == [1, 0]


def test_pictures_are_resized_by_area() -> None:
    """16 pixels, of which one is 160: their mean is 10."""
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 3] = 160
    assert square(image, 1).tolist() == [[[10] * 3]]
    rng = _Fixed(0, 32, np.array([0, 0]))
    prior_crop(_ramp(32, 34), 32, cast(Any, rng))
    assert rng.asked[0] == (0, 1)
    assert order.VERSION == 2 and choose._TIES == 32


def test_the_last_code_of_a_nucleus_is_doubtful_alone() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert _drawable(logits, False, top_p=0.8) == {0: True, 1: True, 2: False}
    shares = torch.softmax(torch.tensor([logits]), 1)
    before = float((shares.cumsum(1) - shares)[0, 1])
    assert list(_drawable(logits, True, top_p=before)) == [0]


@torch.no_grad()
def test_id_0_is_a_word_and_pads_are_none() -> None:
    clip = Clip(ClipConfig(pixels=8, patch=4, dim=32, heads=2, layers=1, text_vocabulary=9), 3)
    text = torch.full((3, 24), -1)
    text[:, 0] = torch.tensor([0, 1, 2])
    embedded = clip.embed_text(text)
    assert float((embedded[0] - embedded[1]).norm()) > 1e-3
    clip.words.weight[0] = torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert clip.embed_text(text)[1:].allclose(embedded[1:], atol=1e-6)


@torch.no_grad()
def test_a_reader_takes_the_gain_into_its_last_convolution() -> None:
    dvae = DVAE(DVAEConfig(pixels=8, width=8, groups=2, codebook=40, gain=0.3))
    for i, p in enumerate(dvae.parameters()):
        p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    states = CodeReader(dvae)._states(0.8 * image + 0.1)
    torch.testing.assert_close(states, dvae.encoder[:-1](0.8 * image + 0.1), rtol=1e-4, atol=1e-5)


def test_linear_layers_have_a_fan_in_and_names_no_prefix() -> None:
    line = nn.Linear(400, 30)
    init_fan_in(line, 0)
    assert float(line.weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    init_normal(one, 0, {"weight": 1.0})
    init_normal(other, 0, {"weight": 1.0}, "")
    assert one.weight.equal(other.weight)


def test_the_largest_draw_is_finite_and_blocks_hold_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.tensor([7])
    assert noise.philox_bits(keys, 1, 0).shape == (1, 8) and noise._A_BLOCK == 8
    assert noise._signed(2**64 - 1) == -1 and noise._signed(2**63) == -(2**63)
    assert noise._signed(2**63 - 1) == 2**63 - 1 and noise._signed(1) == 1
    ends = torch.tensor([[0, 2**32 - 1]])
    monkeypatch.setattr(noise, "draw_bits", lambda *_: ends)
    draws = noise.gumbel_noise(keys, (2,))[0].tolist()
    assert draws == pytest.approx([-3.1300, 22.8739], abs=1e-4)  # -ln(33 ln 2), 33 ln 2


def test_the_heads_backward_is_in_16_bits_only_under_bf16() -> None:
    class Noted(nn.Module):
        def forward(self, x: Tensor, half: bool) -> Tensor:
            seen.append(half)
            return x

    head, seen = PriorHead(CONFIG, TensorParallel()), []
    head.text, head.image = cast(Any, Noted()), cast(Any, Noted())
    x = torch.zeros(1, CONFIG.length, CONFIG.dim)
    head(x)
    with torch.autocast("cpu", torch.bfloat16):
        head(x)
    with torch.autocast("cpu", torch.float16):
        head(x)
    assert seen == [False, False, True, True, False, False]
    program = prior_program(CONFIG, 0)
    assert program.losses == ("loss", "text_loss", "image_loss")
    ends = ("q", "k", "v", "out", "gate", "up", "down")
    assert program.compressed == tuple(f"{name}.weight" for name in ends)


@pytest.mark.parametrize("kind", [AdamW, AdamW16])
def test_an_epsilon_and_no_decay_of_its_own(kind: Any) -> None:
    """A gradient of 1 with epsilon 1 moves half of the rate; a gradient of 0 moves nothing."""
    weights = [nn.Parameter(torch.full((2,), 3.0)) for _ in range(2)]
    optimizer = kind([{"params": weights}], lr=0.5, betas=(0.9, 0.96), eps=1.0)
    weights[0].grad, weights[1].grad = torch.ones(2), torch.zeros(2)
    optimizer.step()
    assert weights[0].tolist() == pytest.approx([2.75] * 2, rel=1e-2)
    assert weights[1].tolist() == [3.0, 3.0]
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_a_cap_below_one_acts_on_gradients_below_one() -> None:
    """0.04 * 0.4^2 = 0.0064 is above 0.005; 0.04 * 0.4^3 is not."""
    weight = nn.Parameter(torch.ones(3))
    groups = [{"params": [weight]}]
    optimizer = AdamW(groups, lr=0.1, betas=(0.9, 0.96), eps=1e-8, max_variance=0.005)
    weight.grad = torch.full((3,), 0.4)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].tolist() == pytest.approx([0.005] * 3)


def test_variances_are_touched_only_where_they_could_pass_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2^2 / 2 equals a cap of 2; without a cap the largest gradient is not computed."""
    weight = nn.Parameter(torch.ones(3))
    groups = [{"params": [weight]}]
    weight.grad = torch.full((3,), 2.0)
    for most, cut in ((2.0, 0), (1.99, 1)):
        optimizer = AdamW(groups, lr=0.1, betas=(0.9, 0.5), eps=1e-8, max_variance=most)
        assert len(optimizer._lower_variances()) == cut
    monkeypatch.setattr(torch, "_foreach_norm", None)
    AdamW(groups, lr=0.1, betas=(0.9, 0.5), eps=1e-8).step()


def test_the_slowest_rank_says_what_a_link_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(number: int) -> float:
        times = iter([[1.0] * 3 + [2.0] * 3, [3.0] * 3 + [5.0] * 3][number])
        monkeypatch.setattr(advisor, "_timed_all_reduce", lambda *_: next(times))
        return measure_link(cast(Any, dist.group.WORLD), CPU).bandwidth

    assert forked_ranks(tmp_path, 2, measure) == [pytest.approx(4128768 / 2)] * 2


def test_what_is_not_a_number_comes_back_as_zero() -> None:
    assert orthogonal.SHIFT == 1e-6
    shards = [MatrixShard(name="w", rows=3, columns=4)]
    power = PowerSGD(shards, rank=1, seed=0, group=None, device=CPU)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    reduced = power.reduce({"w": torch.ones(3, 4), "b": bad})
    assert reduced.gradients["b"].tolist() == [0.0, 0.0, 0.0, 2.0]
    huge = power.reduce({"w": torch.full((3, 4), 3e38), "b": torch.ones(1)})
    assert huge.norm_squared == math.inf


def test_a_branch_filters_what_16_bits_cannot_hold() -> None:
    branch, x = Branch(), torch.ones(4, requires_grad=True)
    branch.scale = Scale(value=2.0)
    slopes = torch.tensor([1e6, -1e6, math.nan, 4.0])
    (branch.enter(x) * slopes).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 0.0, 2.0]


def test_an_average_keeps_weights_of_its_own() -> None:
    engine = _Slices()
    average = Average(cast(Any, engine), OptimConfig(ema=0.5, ema_every=1), CPU)
    engine.data.fill_(8.0)
    assert next(iter(average.slices())).data.tolist() == [0.0] * 3
    average.update(1)
    assert next(iter(average.slices())).data.tolist() == [4.0] * 3


@torch.no_grad()
@pytest.mark.parametrize(("together", "parts"), [(8, [2, 1]), (3, [1, 1, 1])])
def test_validation_pictures_are_looked_at_in_parts(
    together: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 tokens each."""
    from dataclasses import replace

    monkeypatch.setattr(dvae_task, "TOGETHER", together)
    task, calls = _dvae_task(), []
    task.model_config = replace(task.model_config, pixels=4, groups=2, codebook=5)
    task.dvae = DVAE(task.model_config)
    tokens = task.dvae.tokens
    task.dvae.tokens = lambda image: calls.append(len(image)) or tokens(image)  # type: ignore
    records = [_picture(i, 6) for i in range(3)]
    task.figures(cast(Any, None), records, records)
    assert calls == parts
    grey = torch.full((1, 3, 1, 1), 0.75)
    assert dvae_task._rows(grey, grey).tolist() == [[[191] * 3], [[191] * 3]]
    values = torch.tensor([[0.0, 0.75, 2.0], [-1.0, 0.5, 1.0]]).view(1, 3, 1, 2)
    assert to_bytes(values).tolist() == [[[[0, 255, 128], [191, 0, 255]]]]


@torch.no_grad()
@pytest.mark.parametrize(
    ("start", "quantizer", "vgg"),
    [("calibrated", "gumbel", None), ("paper", "gumbel", None), ("calibrated", "vq", Path("vgg"))],
)
def test_a_dvae_is_calibrated_where_its_start_says_so(
    start: Any, quantizer: Any, vgg: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the first pictures of the train split; otherwise it keeps its drawn weights.

    Without a file of VGG16, nothing fills its weights, as in a plan.
    """
    filled: list[Any] = []
    monkeypatch.setattr(Perceptual, "fill", lambda self, *files: filled.append(files))
    perceptual = PerceptualConfig(weight=float(start == "calibrated"), vgg=vgg, linear=vgg)
    store = FolderStore(tmp_path)
    for split in SPLITS:
        writer = RawWriter(store, split, PackConfig(block=2))
        for i in range(4):
            name = f"{split}{i}"
            writer.add(make_pair(name, _picture(i, 8).image, ".png", b"x", name), "x")
        writer.flush()
        write_split(store, f"{split}/", [writer.shards], {}, {})
    config = DVAEConfig(
        pixels=8, width=4, groups=2, codebook=5, vector=5, init=start, quantizer=quantizer
    )
    task = DVAETask(
        DVAETrain(
            data=str(tmp_path), model=config, loop=LoopConfig(global_batch_size=2, seed=3),
            order=OrderConfig(lanes=1, shuffle_buffer=1), perceptual=perceptual,
        )
    )  # fmt: skip
    assert filled == ([] if vgg is None else [(vgg, vgg)])
    expected = DVAE(config, 3)
    first = task._squares(first_records(task.train, 4), task.train)
    if start == "calibrated":
        expected.calibrate(first, 3)
        deviations = task.dvae.logits(first).std((0, 2, 3))
        assert deviations.tolist() == pytest.approx([1.0] * 5, rel=1e-4)
    state = task.dvae.state_dict()
    assert all(state[name].equal(value) for name, value in expected.state_dict().items())


def test_captions_stand_at_the_edge_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    task = _prior_task(0.3)
    record = [_token(0, [1, 2], [0, 0, 0, 0])]
    for drawn, first in ((0.3, 1), (0.2999, -1)):
        monkeypatch.setattr(tasks, "key_fraction", lambda *_, drawn=drawn: drawn)
        assert int(task.batch(record, 5)["text"][0, 0]) == first
    assert task.unreadable == 0


@pytest.mark.parametrize("drawn", [0, 1, 2, 5])
def test_shuffled_captions_are_whole_and_of_other_pictures(
    drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 pictures: 1 + a keyed number modulo 3 places back; nothing is dropped."""
    task = _prior_task(0.99)
    task.model_config = _five()
    monkeypatch.setattr(tasks, "key_int", lambda *_: drawn)
    records = [_token(i, [i], [i, 4, 0, 0]) for i in range(4)]
    reads: list[int] = []
    blocks = SimpleNamespace(
        sizes=[1] * 2001,
        read=lambda b: reads.append(b) or [records[b % 4]],
        manifest=SimpleNamespace(figures={}),
    )
    task.train = cast(Any, blocks)
    seen: list[int] = []

    def means(mine: Any, change: Any) -> dict[str, float]:
        seen.extend(change(tasks.token_batch(mine, 3), 0)["text"][:, 0].tolist())
        return {"image_loss": 0.0}

    figures, _ = task.figures(means, records, records)
    assert seen == [(i - 1 - drawn % 3) % 4 for i in range(4)]
    assert sorted(reads) == list(range(2000))
    assert figures["per_position_entropy"] == pytest.approx(math.log(4) / 4)
    single = [records[0]]
    seen.clear()
    task.figures(means, single, single)
    assert seen == [0], "one picture has only its own"
    assert len(reads) == 2000, "the entropy is computed once a run"


def _five() -> Any:
    from dataclasses import replace

    return replace(_prior_task(0.0).model_config, image_vocabulary=5)


class _World:
    """The world of one of two ranks; what rank 0 has is 7."""

    def __init__(self, rank: int) -> None:
        self.rank, self.device = rank, "cpu"

    def of_rank_0(self, value: float) -> float:
        return 7.0 if self.rank else value

    def gather_text(self, text: str) -> list[str]:
        return [text]


def _network(pictures: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """One feature, the first byte; two logits."""
    first = pictures[:, :1, 0, 0].astype(np.float64)
    return first, np.repeat(first + 100, 2, 1)


def test_a_step_s_batch_is_on_the_cpu() -> None:
    """Under another default device; `meta` holds no values."""
    with torch.device("meta"):
        batch = _dvae_task(augment=False).batch([_picture(1)], 0)
    assert {name: value.device.type for name, value in batch.items()} == dict.fromkeys(batch, "cpu")
    assert set(batch) == {"pixels", "keys", "tau", "beta"}


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_has_an_inception(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvae_task, "Inception", lambda *arguments: arguments)
    task = _dvae_task()
    task._world = cast(Any, _World(rank))
    task._set_inception(Path("weights"))
    assert task._inception == (None if rank else (Path("weights"), "cpu"))


@pytest.mark.parametrize(("rank", "has", "distance"), [(0, True, 6.0), (0, False, 0.0),
                                                       (1, False, 7.0)])  # fmt: skip
def test_the_fid_of_reconstructions_by_hand(rank: int, has: bool, distance: float) -> None:
    """Features of 0 and 2, then of 3 and 3: 2^2 between the means, and 2 + 0."""
    task, beats = _dvae_task(), list[str]()
    task._world = cast(Any, _World(rank))
    task._inception = cast(Any, _network) if has else None
    first, again = (
        torch.tensor(values, device="cpu").view(2, 1, 1, 1).expand(2, 3, 4, 4) / 255
        for values in ([0.0, 2.0], [3.0, 3.0])
    )
    assert task._rfid(first, again, beats.append) == pytest.approx(distance)
    assert beats == ["rfid", "rfid"] * has


def test_features_are_extracted_of_32_pictures_at_a_time() -> None:
    beats, ramp = list[str](), torch.arange(65.0).view(65, 1, 1, 1).expand(65, 3, 2, 2) / 255
    features = dvae_task._features(cast(Any, _network), ramp, beats.append)
    assert features.tolist() == [[float(i)] for i in range(65)]
    assert beats == ["rfid"] * 3


@torch.no_grad()
@pytest.mark.parametrize("asked", [None, Path("weights")])
def test_figures_hold_the_fid_if_it_is_asked_for(
    asked: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _dvae_task(rfid=asked)
    grey = torch.full((1, 3, 8, 8), 0.5)
    task.dvae = cast(Any, SimpleNamespace(
        parameters=lambda: iter([grey]),
        tokens=lambda image: torch.zeros(len(image), 16, dtype=torch.int64),
        picture=lambda codes: grey.expand(len(codes), -1, -1, -1),
    ))  # fmt: skip
    monkeypatch.setattr(task, "_rfid", lambda pixels, again, beat: float(len(pixels) + len(again)))
    records = [_picture(i) for i in range(3)]
    figures, _ = task.figures(cast(Any, None), records, records)
    assert figures.get("rfid") == (6.0 if asked else None)
