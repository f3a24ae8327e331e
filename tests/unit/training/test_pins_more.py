"""Pins that a run of `make mutants` asked for."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.errors import InputError
from data_pipeline.formats.raw import RawRecord
from data_pipeline.images.crops import encode_png
from data_pipeline.streaming.readable import ReadablePairs
from generation.config import DrawSettings
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.kv_cache import Lane
from generation.sampling.sampler import Prompt, SampledLane, Sampler, with_empty
from models import code_encoder as codes
from models import initialization as draws
from models import keyed_noise as noise
from models.attention import banded as attention
from models.attention.flexible import BLOCK, block_mask
from models.attention.masks import full_mask, image_mask
from models.clip import Clip
from models.code_encoder import CodeReader
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.initialization import generator, init_fan_in, init_normal
from models.logit_laplace import kl_to_uniform
from models.prior import build_prior
from parallel.adamw import AdamW
from parallel.compress import advisor
from parallel.compress.advisor import Link, chosen_rank
from parallel.compress.powersgd import MatrixShard
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.device import CPU
from parallel.engines.modules import Compressor
from parallel.engines.protocol import EngineSettings
from parallel.mesh import Group
from parallel.placement import Placement
from parallel.scales import Branch, Scale
from parallel.tensor.ops import TensorParallel
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like
from training.config import ClipTrain, LoopConfig, PriorTrain
from training.tasks import prior as tasks
from training.tasks.clip import ClipTask
from training.tasks.dvae import CALIBRATED, SHOWN, TOGETHER
from training.tasks.prior import PriorTask


def test_matrices_gradients_are_rounded_and_gains_are_not() -> None:
    """Scaled 8192 and 2 add up to 8194, which 16 bits hold as 8192."""
    for shape, expected in (((1,), 8194 / 8192), ((1, 1), 1.0)):
        branch, scale = Branch(), Scale()
        weight = nn.Parameter(torch.ones(shape))
        branch.watch([weight], scale)
        slopes = torch.tensor([1.0, 2.0**-12]).view(2, *shape[1:])
        (branch.leave(weight.expand(2, *shape[1:])) * slopes).sum().backward()
        assert weight.grad is not None and float(weight.grad) == expected


def test_the_pieces_of_philox() -> None:
    assert noise._signed(2**64 - 1) == -1 and noise._signed(2**63) == -(2**63)
    assert noise._signed(2**63 - 1) == 2**63 - 1 and noise._signed(0) == 0
    words = torch.tensor([-1, 3, 2**62])
    high, low = noise._product(2**64 - 1, words)
    for word, upper, lower in zip((2**64 - 1, 3, 2**62), high.tolist(), low.tolist(), strict=True):
        exact = (2**64 - 1) * word
        assert (upper % 2**64, lower % 2**64) == (exact >> 64, exact % 2**64)
    meta = torch.zeros(2, dtype=torch.int64, device="meta")
    for count in (1, 8, 9, 17, 64):
        assert noise.draw_bits(meta, count).shape == (2, count)
        assert noise.philox_bits(torch.tensor([1]), -(-count // 8), 0).shape[1] >= count


def _clip_task() -> ClipTask:
    task = object.__new__(ClipTask)
    task._settings = ClipTrain(loop=LoopConfig(seed=3))
    task._readable = ReadablePairs()
    task.model_config = ClipConfig(pixels=4, text_length=3)
    task._tokenizer = cast(Any, None)
    return task


def test_captions_are_drawn_in_training_alone_and_bad_pictures_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from training.tasks import clip

    monkeypatch.setattr(clip, "encode", lambda _, caption: [ord(c) for c in caption])
    task, sources = _clip_task(), []
    plain = np.full((4, 6, 3), 51, np.uint8)

    class Readable:
        def decoded(self, records: Any, source: Any, crop: Any) -> Any:
            sources.append(source)
            return [(record, crop(record, plain)) for record in records]

    task._readable, task.train, task.held_out = (cast(Any, x) for x in (Readable(), "t", "v"))
    record = SimpleNamespace(
        caption="a", captions=["a", "bc"], drawn_caption=lambda seed, step: f"{seed}{step}"
    )
    batch = task.batch([cast(RawRecord, record)], 5)
    assert batch["text"].tolist() == [[ord("3"), ord("5"), -1]]
    assert batch["pixels"].shape == (1, 3, 4, 4)
    assert batch["pixels"].unique().tolist() == pytest.approx([0.2])
    assert task.batch([cast(RawRecord, record)], 5, False)["text"].tolist() == [[97, -1, -1]]
    assert sources == ["t", "v"]
    assert task.text_lengths([cast(RawRecord, record)]) == [1, 2]
    assert (SHOWN, CALIBRATED, TOGETHER) == (8, 256, 4096)


@pytest.mark.parametrize(("rate", "digest"), [(0.0, "x"), (0.1, "same"), (0.1, "other")])
def test_dropout_wants_the_tokenizer_of_the_tokens(
    rate: float, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "load_tokenizer", lambda folder: ("tokenizer", digest))
    monkeypatch.setattr(tasks, "DropoutEncoder", lambda *given: given)
    task = object.__new__(PriorTask)
    task._settings = PriorTrain(bpe_dropout=rate)
    task.train = SimpleNamespace(has_index=True)  # type: ignore[assignment]
    task._facts = {"tokenizer": "same", "dvae": "d", "grid": 4, "more": 1}
    if digest == "other":
        with pytest.raises(InputError, match="is not the tokenizer"):
            task._open_dropout()
    else:
        assert task._open_dropout() == (("tokenizer", 0.1) if rate else None)
    facts = {"tokenizer": "same", "dvae": "d", "grid": 4, "caption_dropout": 0.0}
    assert task.facts() == facts
    task._facts["columns"] = 6
    assert task.facts() == {**facts, "columns": 6}


@pytest.mark.parametrize(("columns", "codes"), [(None, 4), (3, 6)])
def test_a_set_without_columns_has_a_square_grid(
    columns: int | None, codes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"text_vocabulary": 5, "image_vocabulary": 4, "grid": 2}
    facts |= {"columns": columns} if columns else {}
    source = SimpleNamespace(manifest=SimpleNamespace(facts=facts), has_index=False)
    monkeypatch.setattr(tasks, "open_source", lambda *_: source)
    monkeypatch.setattr(tasks, "refuse_unfit", lambda *_: None)
    small = PriorConfig(dim=8, heads=1, layers=1, text_length=3)
    config = PriorTask(PriorTrain(model=small), TensorParallel()).model_config
    assert config.image_length == codes and config.grid_columns == (columns or 2)
    assert (config.text_vocabulary, config.image_vocabulary, config.grid) == (5, 4, 2)


def test_lengths_of_captions_are_their_tokens() -> None:
    task = object.__new__(PriorTask)
    records = [SimpleNamespace(texts=[np.zeros(n) for n in lengths]) for lengths in ((0,), (3, 1))]
    assert task.text_lengths(cast(Any, records)) == [0, 3, 1]


def test_defaults_of_masks_and_divergences() -> None:
    assert image_mask("conv", 16).equal(image_mask("conv", 16, 11))
    assert not image_mask("conv", 16).equal(image_mask("conv", 16, 13))
    assert full_mask("conv", 2, 16).equal(full_mask("conv", 2, 16, 11))
    logits = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    assert kl_to_uniform(logits).equal(kl_to_uniform(logits, 1))


def test_blocks_of_128_pairs() -> None:
    mask = block_mask("row", 128, 16, 11, "cpu")
    assert BLOCK == 128 and mask.BLOCK_SIZE == (128, 128)
    assert tuple(mask.shape) == (1, 1, 384, 384)


@pytest.mark.parametrize(("grid", "together"), [(4, 65536 // 128), (32, 1)])
def test_heads_that_stay_in_a_cores_cache(grid: int, together: int) -> None:
    band = attention.band_of("row", 3, grid, 11)
    assert band.halo == grid and band.bias.shape == (grid, grid, 2 * grid)
    assert attention.CACHED == 65536 and band.together == together


def test_tiles_are_made_on_the_cpu_wherever_a_model_is_laid_out() -> None:
    for cached in (attention.band_of, attention._repeated):
        cached.cache_clear()
    with torch.device("meta"):
        for kind in ("row", "column", "conv"):
            band = attention.band_of(kind, 3, 4, 11)  # type: ignore[arg-type]
            assert band.bias.device.type == "cpu" and band.bias.is_contiguous()
            assert image_mask(kind, 4).device.type == "cpu"  # type: ignore[arg-type]
            assert full_mask(kind, 3, 4).device.type == "cpu"  # type: ignore[arg-type]
        clip_weights = torch.empty(0)
    assert clip_weights.is_meta
    attention.band_of.cache_clear()


def test_weights_are_drawn_on_the_cpu_wherever_a_model_is_built() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1, device="cpu")
            self.weight = nn.Parameter(torch.zeros(2, 2, device="cpu"))

    module = Tiny()
    with torch.device("meta"):
        init_fan_in(module, 1)
        init_normal(module, 1, {"weight": 1.0})
    drawn = torch.randn(3, 2, 1, 1, generator=generator(1, "conv.weight", "init"))
    again = Tiny()
    init_fan_in(again, 1)
    assert torch.allclose(again.conv.weight, drawn / math.sqrt(2))
    assert again.conv.bias is not None and not again.conv.bias.any()
    init_fan_in(again, 1, "conv")
    assert again.conv.weight.equal(drawn)
    init_normal(again, 1, {"weight": 1.0})
    assert again.weight.equal(module.weight) and draws.ROWS_A_KEY == 64
    meta = nn.Conv2d(2, 3, 1, device="meta")
    init_fan_in(meta, 0)
    init_normal(meta, 0, {})


@torch.no_grad()
def test_a_reader_s_precisions() -> None:
    dvae = DVAE(DVAEConfig(pixels=8, width=8, groups=2, codebook=40))
    plain, half = CodeReader(dvae), CodeReader(dvae, "bf16")
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert plain.codes(image).equal(dvae.tokens(image)) and codes.CANDIDATES == 8
    states = [r._states((0.8 * image + 0.1).clone()) for r in (plain, half)]
    assert not states[0].equal(states[1]), "residual branches are in 16 bits"
    torch.testing.assert_close(states[0], states[1], rtol=0.05, atol=0.05)
    kinds = {p.dtype for p in half._body.g0b0.convs.parameters()}  # type: ignore[union-attr]
    assert kinds == {torch.bfloat16} and half._body.input.weight.dtype == torch.float32
    assert half._output.weight.dtype == torch.float32 and half._weight16.dtype == torch.bfloat16
    for reader in (plain, half):
        assert not any(p.requires_grad for p in reader._body.parameters())
    weight = dvae.encoder.g0b0.convs[0].weight
    assert weight.requires_grad and weight.dtype == torch.float32


def test_no_table_gives_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(advisor, "measure_link", lambda *_: Link(latency=0.0, bandwidth=1.0))
    row = SimpleNamespace(rank=7, gained_ms=0.0, sent_bytes=1, raw_bytes=1, compute_ms=1.0,
                          break_even=1.0)  # fmt: skip
    shards = [MatrixShard(name="w", rows=2, columns=2)]
    assert chosen_rank([], 1, 1, cast(Any, None), CPU) == 0
    for gained, rank in ((0.0, 0), (0.5, 7), (-0.5, 0)):
        row.gained_ms = gained
        monkeypatch.setattr(advisor, "advise", lambda *_: [row] * 4)
        assert chosen_rank(shards, 1, 1, cast(Any, None), CPU) == rank


class _Stored:
    """A checkpoint of error buffers and a basis; records the requests."""

    def __init__(self, kinds: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        self._kinds, self._shape = kinds, shape

    def kinds(self, name: str) -> list[str]:
        return list(self._kinds)

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        return self._shape

    def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self._kinds[kind][start:stop]


@pytest.mark.parametrize("warm", [False, True])
def test_a_compressor_takes_its_rows_back(warm: bool) -> None:
    """Rows 2 and 3 of a 4 x 3 matrix; of a basis (6, 1) over two parts the second three."""
    held = {"w": Placement(shape=(4, 3), first=2, rows=2, split=True)}
    shards = [MatrixShard(name="w", rows=2, columns=3, shard=1)]
    settings = EngineSettings(
        optim=OptimConfig(), engine=EngineConfig(), seed=5,
        compress=CompressConfig(rank=2, warm_start=warm),
    )  # fmt: skip
    one = Compressor(held, shards, 2, settings, Group(None, 0, 1), Group(None, 1, 2), CPU)
    drawn = one._powersgd.bases()["w"].clone()
    stored = {"error@0": torch.arange(12.0), "basis": 100 + torch.arange(6.0)}
    one.load(cast(Any, _Stored(stored, (6, 1))))
    assert one._powersgd.errors()["w"].tolist() == [[6, 7, 8], [9, 10, 11]]
    basis = one._powersgd.bases()["w"]
    assert basis.tolist() == ([[103], [104], [105]] if warm else drawn.tolist())
    one.load(cast(Any, _Stored({"error@0": torch.zeros(12)}, ())))
    assert one._powersgd.bases()["w"].equal(drawn if not warm else basis)
    one.load(cast(Any, _Stored(stored, (9, 1))))
    assert not one._powersgd.errors()["w"].equal(torch.zeros(2, 3))


def test_what_fits_is_asked_with_the_given_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from generation.sampling import sampler as sampling

    asked: list[Any] = []
    monkeypatch.setattr(sampling, "fitting", lambda need, *rest: asked.append((need, *rest)) or 3)
    decoder = Decoder(LocalPrior(layers=trained_like(), config=CONFIG))
    kept = torch.arange(16) < 5
    prompt = Prompt(codes=torch.zeros(16, dtype=torch.int64), kept=kept)
    for settings, streams, most in ((DrawSettings(), 1, 9), (DrawSettings(guidance=2.0), 2, 128)):
        sampler = Sampler(decoder, lambda device: 77, batch=most)
        assert sampler._fitting(2, 4, settings, prompt) == 3
        need, batch, free, device, _ = asked[-1]
        assert (need.captions, need.candidates, need.given) == (2, 4, 5)
        assert (need.streams, need.lanes, batch, free) == (streams, 1, most, 77)
        assert device == CPU
    assert sampler._fitting(1, 1, DrawSettings(), None) == 3 and asked[-1][0].given == 0


def test_a_lane_starts_from_what_is_given() -> None:
    decoder = Decoder(LocalPrior(layers=trained_like(), config=CONFIG))
    batch, kept = prior_batch(), torch.tensor([True] * 3 + [False] * 10 + [True] * 3)
    prompt = Prompt(codes=batch["image"][0], kept=kept)
    keys = [[(1, "a", i) for i in range(2)]] * 3
    lane = SampledLane(decoder, batch["text"], cast(Any, keys), DrawSettings(guidance=2.0), prompt)
    assert (lane._first, lane._end, lane._captions, lane._each) == (3, 13, 3, 2)
    assert isinstance(lane._lane, Lane) and (lane._lane.captions, lane._lane.each) == (6, 2)
    assert lane._codes.tolist() == [(prompt.codes * kept).tolist()] * 6
    empty = with_empty(batch["text"], DrawSettings(guidance=2.0))
    assert empty[:3].equal(batch["text"]) and (empty[3:] == -1).all()


def test_bytes_of_a_decoder_are_its_weights() -> None:
    """12 dim^2 and 9 dim a layer, k's zero bias stored, and the head; 4 bytes each."""
    layers = trained_like()
    whole = Decoder(LocalPrior(layers=layers, config=CONFIG))
    names = list(layers)
    without_head = {name: layers[name] for name in names[:-1]}
    part = Decoder(LocalPrior(layers=without_head, config=CONFIG))
    assert whole.bytes - part.bytes >= 4 * 48 * 20 and part.bytes >= 4 * 4 * 12 * 48 * 48
    assert encode_png(np.zeros((2, 2, 3), np.uint8))[:4] == b"\x89PNG"
    assert whole.alone


@torch.no_grad()
@pytest.mark.parametrize("layers", [2, 4])
def test_the_step_in_one_shape_for_all_positions_equals_the_plain_one(layers: int) -> None:
    """The step that GPUs compile: every position reads the same number of slots, padded."""
    config = replace(CONFIG, layers=layers)
    prior, batch = trained_like(config), prior_batch()
    plain, padded = (Decoder(LocalPrior(layers=prior, config=config)) for _ in range(2))
    padded._compiled = padded._run
    lanes = [d.start(batch["text"], batch["image"][:, :0], 1) for d in (plain, padded)]
    for position in range(16):
        before = batch["image"][:, max(position - 1, 0)]
        logits = [d.next(lane, position, before) for d, lane in zip((plain, padded), lanes)]  # noqa: B905
        assert logits[0] is not None and logits[1] is not None
        torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp32_near_ties_are_drawn_again(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from generation.sampling import draw as choosing

    monkeypatch.setattr(choosing, "CLOSE", 0.5)
    decoder, asked = Decoder(LocalPrior(layers=trained_like(), config=CONFIG), precision), []
    recompute = decoder.canonical_logits
    monkeypatch.setattr(
        decoder, "canonical_logits", lambda *given: asked.append(1) or recompute(*given)
    )
    keys = [[(1, "a", i) for i in range(3)]]
    list(Sampler(decoder).draw(prior_batch()["text"][:1], cast(Any, keys), DrawSettings()))
    assert bool(asked) == (precision == "fp32")


def test_a_small_cap_acts_on_small_gradients() -> None:
    """0.04 * 0.5^2 = 0.01 is above a cap of 0.005, though 0.5 is below one."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [weight]}], lr=0.1, betas=(0.9, 0.96), eps=1e-8,
                      max_variance=0.005)  # fmt: skip
    weight.grad = torch.full((3,), 0.5)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].tolist() == pytest.approx([0.005] * 3)
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.05] * 3)
    none = nn.Parameter(torch.ones(1))
    AdamW([{"params": [none]}], lr=0.1, betas=(0.9, 0.96), eps=1e-8, max_variance=1.0).step()
    assert none.item() == 1.0


def test_seeds_have_their_defaults() -> None:
    config = DVAEConfig(pixels=8, width=4, groups=2, codebook=4)
    for one, other in ((DVAE(config), DVAE(config, 0)), (Clip(ClipConfig(text_vocabulary=4)),
                       Clip(ClipConfig(text_vocabulary=4), 0)), (build_prior(CONFIG),
                       build_prior(CONFIG, 0))):  # fmt: skip
        states = one.state_dict(), other.state_dict()
        assert all(states[0][name].equal(states[1][name]) for name in states[0])
