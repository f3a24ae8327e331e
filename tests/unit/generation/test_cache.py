"""Caches keep only what later positions read; a batch that does not fit is split."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from core.errors import ConfigError
from generation.config import DrawSettings
from generation.sampling.batches import Batch, Need, batches
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.kv_cache import CacheShape, Lane, reads_of
from generation.sampling.sampler import Keys, Prompt, Sampler
from models.attention.masks import Kind, image_mask, layer_kind
from models.config import PriorConfig
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like

KINDS: tuple[Kind, ...] = ("row", "column", "conv")
LARGEST = PriorConfig(
    dim=3968,
    heads=62,
    layers=64,
    text_length=256,
    text_vocabulary=16_384,
    image_vocabulary=8192,
    grid=32,
)
"""The paper's 12 billion parameters."""
KEYS: Keys = [[(7, f"caption {i}", j) for j in range(4)] for i in range(3)]
GUIDED = DrawSettings(guidance=2.0, top_p=0.9)


def shape_of(config: PriorConfig, dtype: torch.dtype) -> CacheShape:
    kinds = tuple(layer_kind(i + 1, config.layers) for i in range(config.layers))
    return CacheShape(config=config, kinds=kinds, heads=config.heads, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid,kernel", [(1, 11), (2, 3), (4, 11), (5, 3), (8, 5), (8, 11)])
def test_a_slot_is_taken_again_when_nobody_reads_it_any_more(
    kind: Kind, grid: int, kernel: int
) -> None:
    mask, reads = image_mask(kind, grid, kernel), reads_of(kind, grid, kernel)
    held = torch.full((reads.slots,), -1)
    for position in range(grid * grid):
        exact, padded = (
            reads.cache_position(position),
            reads.cache_position_at(torch.tensor([position])),
        )
        held[exact.slot] = position
        visible = mask[position].nonzero().flatten()
        assert held[exact.reads].equal(visible) and padded.slot.equal(exact.slot)
        assert padded.bias is not None
        assert held[padded.reads[padded.bias == 0]].equal(visible)
    needed = [(mask[p:, : p + 1].any(0)).sum() for p in range(grid * grid)]
    assert reads.slots == max(needed), "fewer slots would do"


def test_the_paper_s_masks_need_few_slots() -> None:
    """Column: only its own position reads a code of the last row, so 31 rows and one slot do."""
    slots = {kind: reads_of(kind, 32, 11).slots for kind in KINDS}
    assert slots == {"row": 33, "column": 31 * 32 + 1, "conv": 5 * 32 + 5 + 1}


def test_the_caches_of_the_largest_prior() -> None:
    """64 candidates of one caption, in 16 bits; with all positions kept it was 1.04 GB each."""
    lane = shape_of(LARGEST, torch.bfloat16).lane(1, 64, torch.device("meta"))
    tensors = [x for block in lane.blocks for x in vars(block).values()]
    assert {x.device.type for x in tensors} == {"meta"} and len(lane.blocks) == 64
    assert lane.bytes == sum(x.numel() * 2 for x in tensors)
    text, each = lane.text_bytes / 1e9, lane.image_bytes / 64 / 1e9
    assert round(text, 2) == 0.26
    assert each <= 0.35 and round(each, 2) == 0.28
    assert lane.bytes / 64 / 1e9 <= 0.35, "with its share of the text"


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decoder_lays_out_what_its_shape_says(precision: str, one_row: bool) -> None:
    decoder = Decoder(LocalPrior(layers=trained_like(), config=CONFIG), precision, one_row)
    batch = prior_batch()
    lane = decoder.start(batch["text"], batch["image"][:, :5], 2)
    one = decoder.caches.of_one()
    assert (lane.text_bytes, lane.image_bytes) == (3 * one.text_bytes, 6 * one.image_bytes)
    dtype = torch.bfloat16 if precision == "bf16" and not one_row else torch.float32
    assert one.bytes == shape_of(CONFIG, dtype).of_one().bytes
    before = [x.data_ptr() for block in lane.blocks for x in vars(block).values()]
    for position in range(5, 12):
        decoder.next(lane, position, batch["image"][:, position - 1].repeat_interleave(2))
    assert before == [x.data_ptr() for block in lane.blocks for x in vars(block).values()]


class Small(Decoder):
    """A device that holds caches of `capacity` bytes for one lane; records what it allocates."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def __init__(self, layers: nn.ModuleDict, capacity: float = float("inf")) -> None:
        super().__init__(LocalPrior(layers=layers, config=CONFIG))
        self.capacity, self.laid_out = capacity, list[int]()
        self._lane: Callable[[], Lane | None] = lambda: None

    def start(self, text: Tensor, given: Tensor, each: int) -> Lane:
        if self.caches.lane(len(text), each, torch.device("meta")).bytes > self.capacity:
            raise self.error
        assert self._lane() is None, "two lanes at once"
        lane = super().start(text, given, each)
        self._lane = weakref.ref(lane)
        self.laid_out.append(lane.bytes)
        return lane


@pytest.fixture(scope="module")
def layers() -> nn.ModuleDict:
    return trained_like()


def draw(
    decoder: Decoder, settings: DrawSettings, free: int, prompt: Prompt | None = None
) -> Tensor:
    """Codes of 3 captions with 4 candidates each, with `free` bytes of memory."""
    codes = torch.full((3, 4, CONFIG.image_length), -1)
    sampler = Sampler(decoder, lambda device: free)
    for drawn in sampler.draw(prior_batch()["text"], KEYS, settings, prompt):
        codes[drawn.captions, drawn.candidates] = drawn.codes
    return codes


@pytest.mark.parametrize("settings", [DrawSettings(), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("together", [1, 2, 4, 11])
def test_a_batch_that_does_not_fit_is_split(
    layers: nn.ModuleDict,
    settings: DrawSettings,
    together: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    decoder = Small(layers)
    streams = 1 if settings.guidance == 1 else 2
    need = Need(caches=decoder.caches, captions=3, candidates=4, streams=streams)
    free = int(need.bytes(together) / 0.9) + 1
    caplog.set_level(logging.INFO)
    whole = draw(decoder, settings, 10**12)
    assert len(decoder.laid_out) == 1 and not caplog.messages
    decoder.laid_out.clear()
    assert draw(decoder, settings, free).equal(whole)
    assert max(decoder.laid_out) <= free and len(decoder.laid_out) > 1
    (line,) = caplog.messages
    assert "batch of 12 candidates" in line and "GB are free on cpu" in line
    assert f"split, {need.most(128, free)} or fewer together" in line


def test_given_tokens_and_a_split_batch_go_together(layers: nn.ModuleDict) -> None:
    kept = torch.zeros(CONFIG.image_length, dtype=torch.bool)
    kept[[0, 1, 2, 3, 4, 5, 9, 14, 15]] = True
    prompt = Prompt(codes=prior_batch()["image"][1], kept=kept)
    decoder = Small(layers)
    whole = draw(decoder, DrawSettings(), 10**12, prompt)
    need = Need(caches=decoder.caches, captions=3, candidates=4, given=6)
    assert draw(decoder, DrawSettings(), int(need.bytes(3) / 0.9) + 1, prompt).equal(whole)
    assert (whole[:, :, kept] == prompt.codes[kept]).all() and len(decoder.laid_out) > 3


def test_one_candidate_that_does_not_fit_is_refused_before_anything_is_decoded(
    layers: nn.ModuleDict,
) -> None:
    decoder = Small(layers)
    need = Need(caches=decoder.caches, captions=3, candidates=4)
    with pytest.raises(ConfigError, match=r"one candidate takes .* GB are free on cpu.*--tensor"):
        draw(decoder, DrawSettings(), need.bytes(1))
    assert not decoder.laid_out


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_device_that_runs_out_of_memory_gets_halves(
    layers: nn.ModuleDict, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = draw(Small(layers), DrawSettings(), 10**12)
    one = Small(layers).caches.of_one()
    decoder = Small(layers, capacity=one.text_bytes + rows * one.image_bytes)
    assert draw(decoder, DrawSettings(), 10**12).equal(whole)
    assert len(caplog.messages) < 5 and all("ran out of memory" in m for m in caplog.messages)
    with pytest.raises(ConfigError, match=r"ran out of memory.*--batch"):
        draw(Small(layers, capacity=0), DrawSettings(), 10**12)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ],
)
def test_a_host_without_memory_gets_halves_too(
    layers: nn.ModuleDict, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Small, "error", error)
    one = Small(layers).caches.of_one()
    decoder = Small(layers, capacity=one.text_bytes + 2 * one.image_bytes)
    whole = draw(Small(layers), DrawSettings(), 10**12)
    assert draw(decoder, DrawSettings(), 10**12).equal(whole)
    monkeypatch.setattr(Small, "error", RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        draw(Small(layers, capacity=0), DrawSettings(), 10**12)


def test_batches_are_even_and_hold_every_candidate_once() -> None:
    for captions, count, most in [(3, 4, 12), (3, 4, 11), (3, 4, 3), (1, 130, 128), (5, 1, 2)]:
        seen = torch.zeros(captions, count, dtype=torch.int64)
        parts = list(batches(captions, count, most))
        for batch in parts:
            assert 0 < batch.rows <= most
            seen[batch.captions, batch.candidates] += 1
        assert (seen == 1).all()
        assert max(b.rows for b in parts) - min(b.rows for b in parts) <= count
    halves = Batch(captions=slice(2, 3), candidates=slice(5, 10)).halves()
    assert [half.candidates for half in halves] == [slice(5, 7), slice(7, 10)]
    apart = Batch(captions=slice(2, 5), candidates=slice(0, 4)).halves()
    assert [half.captions for half in apart] == [slice(2, 3), slice(3, 5)]


def test_a_need_counts_text_once_a_caption_and_a_lane() -> None:
    shape = shape_of(CONFIG, torch.float32)
    one = shape.of_one()
    need = Need(caches=shape, captions=3, candidates=4)
    assert need.bytes(2) - need.bytes(1) == one.image_bytes
    assert need.bytes(8) - need.bytes(4) > 4 * one.image_bytes + one.text_bytes
    lanes = replace(need, lanes=2)
    assert lanes.bytes(4) - need.bytes(4) == one.text_bytes
    assert replace(need, streams=2).bytes(4) == 2 * need.bytes(4)
