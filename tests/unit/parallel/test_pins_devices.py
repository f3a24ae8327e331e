"""Pins of the device of new tensors, memory layouts of weights, and transfers to a GPU."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from generation.config import DrawSettings
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.sampler import Sampler
from models import keyed_noise as noise
from models.attention import flexible as flex
from models.attention.flexible import block_mask
from models.clip import caption_keys, contrastive_loss
from models.code_encoder import CodeReader
from models.config import DVAEConfig
from models.dvae import DVAE
from parallel.adamw import AdamW, AdamW16
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.device import CPU
from parallel.mesh import Group
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like
from tests.unit.parallel.test_pins_shards import _compressor
from tests.unit.training.test_pins_training import _dvae_task, _picture
from training.tasks.task import hand_over, pad_text


def test_batches_are_on_the_cpu_wherever_a_model_is_laid_out() -> None:
    """Under another default device; `meta` holds no values."""
    task = _dvae_task(augment=False)
    with torch.device("meta"):
        text = pad_text([[3, 1], [2]], 3)
        batch = task.batch([_picture(1)], 0)
    assert text.tolist() == [[3, 1, -1], [2, -1, -1]]
    assert {x.device.type for x in batch.values()} == {"cpu"}


@pytest.mark.parametrize("kind", [AdamW, AdamW16])
def test_an_optimiser_steps_where_its_weights_are(kind: Any) -> None:
    weight = nn.Parameter(torch.full((2,), 3.0))
    optimizer = kind([{"params": [weight]}], lr=0.5, betas=(0.9, 0.96), eps=1e-8,
                     max_variance=1e9)  # fmt: skip
    weight.grad = torch.full((2,), 2.0)
    with torch.device("meta"):
        optimizer.step()
    assert weight.tolist() == pytest.approx([2.5, 2.5])
    assert optimizer.state[weight]["step"].item() == 1.0
    moments = torch.bfloat16 if kind is AdamW16 else torch.float32
    assert optimizer.state[weight]["exp_avg"].dtype == moments
    assert optimizer.defaults.get("fused", True)


def test_factors_are_made_where_the_gradients_are() -> None:
    shards = [MatrixShard(name="w", rows=2, columns=3)]
    ramp = torch.arange(6.0).view(2, 3)
    with torch.device("meta"):
        power = PowerSGD(shards, rank=2, seed=0, group=None, device=CPU)
        gradient = power.reduce({"w": ramp}).gradients["w"]
    assert {x.device for b in power._batches for x in (b.p, b.q, b.q_mean)} == {CPU}
    torch.testing.assert_close(gradient, ramp)


def test_buffers_of_a_checkpoint_are_on_the_cpu() -> None:
    class Stored:
        def kinds(self, name: str) -> list[str]:
            return ["error@0"]

        def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
            return ramp[start:stop]

    ramp = torch.arange(6.0)
    one = _compressor(Group(None, 1, 2), rank=1)
    with torch.device("meta"):
        one.load(cast(Any, Stored()))
    error = one._powersgd.errors()["w"].flatten()
    assert error.tolist() == pytest.approx((ramp * error[1]).tolist()) and error[1] > 0


def test_draws_are_made_where_the_decoder_is() -> None:
    part, text = LocalPrior(layers=trained_like(), config=CONFIG), prior_batch()["text"]
    decoder = Decoder(part)
    keys = cast(Any, [[(1, c, 0)] for c in "abc"])
    settings = DrawSettings(top_p=0.9)
    (plain,) = Sampler(decoder).draw(text, keys, settings)
    with torch.device("meta"):
        (draws,) = Sampler(decoder).draw(text, keys, settings)
        positions = Decoder(part)._positions
    assert draws.codes.equal(plain.codes) and positions.device == CPU


def test_a_mask_is_made_where_it_is_asked_for() -> None:
    block_mask.cache_clear()
    with torch.device("meta"):
        assert block_mask("row", 128, 16, 11, "cpu").kv_indices.device == CPU


def test_a_gpus_mask_is_made_on_it_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "create_block_mask", lambda *sizes, **how: (sizes[1:], how))
    monkeypatch.setattr(flex, "BLOCK", 64)
    mask = cast(Any, block_mask("row", 128, 16, 11, "cuda:1"))
    assert mask == ((None, None, 384, 384), {"device": "cuda:1", "BLOCK_SIZE": 64})
    block_mask.cache_clear()


@pytest.mark.parametrize(("kind", "device"), [(AdamW, "meta"), (AdamW16, "cpu")])
def test_step_counts_are_where_the_update_reads_them(kind: type[AdamW], device: str) -> None:
    """The fused kernel's beside its parameter, the other's on the host."""
    optimizer = kind(
        [{"params": [torch.nn.Parameter(torch.zeros(2))]}], lr=1, betas=(0.9, 0.9), eps=1
    )
    state = optimizer.first_state(torch.zeros(2, device="meta"))
    assert state["step"].device.type == device and state["exp_avg"].device.type == "meta"


def test_noise_is_drawn_where_its_keys_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy on CPUs, torch's integers on other devices: 17 draws take 3 blocks."""
    for name in ("_by_numpy", "philox_bits"):
        monkeypatch.setattr(
            noise, name, lambda keys, n, at, name=name: torch.full((1, 24), n)
            if name == "philox_bits" else name
        )  # fmt: skip
    here, there = (cast(Any, SimpleNamespace(device=torch.device(d))) for d in ("cpu", "cuda"))
    assert noise.draw_bits(here, 17) == "_by_numpy"
    assert noise.draw_bits(there, 17).tolist() == [17 * [3]]


def test_captions_are_compared_where_they_are() -> None:
    eye, keys = torch.eye(2), torch.tensor([1, 2])
    with torch.device("meta"):
        losses = contrastive_loss(eye, eye, torch.tensor(1.0, device=CPU), keys, lambda x: x, 0)
        assert caption_keys(torch.zeros(2, 3, dtype=torch.int64, device=CPU)).device == CPU
    assert losses["loss"].device == CPU and float(losses["accuracy"]) == 1.0


def test_a_gpu_is_handed_pinned_memory_without_waiting() -> None:
    class Host:
        def pin_memory(self) -> str:
            return cast(Any, self.Pinned())  # type: ignore[no-any-return]

        class Pinned:
            def to(self, device: torch.device, non_blocking: bool = False) -> Any:
                return str(device), non_blocking

    batch = cast(Any, {"text": Host()})
    assert hand_over(batch, torch.device("cuda:1")) == {"text": ("cuda:1", True)}


def test_a_step_becomes_one_graph_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, asked = Decoder(LocalPrior(layers=trained_like(), config=CONFIG)), []
    monkeypatch.setattr(torch, "compile", lambda step, **how: asked.append((step, how)))
    decoder.compile("reduce-overhead")
    assert asked == [(decoder._run, {"mode": "reduce-overhead", "dynamic": False})]


def test_convolutions_are_channels_last() -> None:
    """Also after weights in another layout have loaded a checkpoint."""
    dvae = DVAE(DVAEConfig(pixels=8, width=8, groups=2, codebook=40))
    for layer in (dvae.encoder.g0b0, dvae.decoder.g0b0):
        assert layer.convs[0 if layer is dvae.encoder.g0b0 else 1].weight.is_contiguous(
            memory_format=torch.channels_last
        )
    dvae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    weight = CodeReader(dvae)._body.g0b0.convs[0].weight  # type: ignore[union-attr]
    assert weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    assert np.prod(weight.shape[2:]) == 9  # type: ignore[union-attr]


def test_weights_for_single_candidates_are_read_in_order() -> None:
    part = LocalPrior(layers=trained_like(), config=CONFIG)
    for decoder, one_row in (
        (Decoder(part), False),
        (Decoder(part, one_row=False), False),
        (Decoder(part, one_row=True), True),
    ):
        (block, *_) = decoder._blocks
        packed = (block._qkv, block._out, block._up, block._down, decoder._head)
        assert [p._in_order for p in packed if p is not None] == [one_row] * 5
