"""Other trainers of the same width, depth and stream, as their users write the loop."""

import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.config import PriorConfig

Step = Callable[[], None]


def gpt_neox(config: PriorConfig, batch: int, device: torch.device) -> Step:
    """transformers' GPT-NeoX: dense causal attention by SDPA, one vocabulary.

    Raises: ImportError if transformers is not installed.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: PLC0415 - optional peer

    shape = GPTNeoXConfig(
        vocab_size=config.text_vocabulary + config.image_vocabulary,
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.dim,
        max_position_embeddings=config.length,
        attn_implementation="sdpa",
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with device:
        net = GPTNeoXForCausalLM(shape)
        ids = torch.randint(0, config.image_vocabulary, (batch, config.length))
    return _step(net, lambda: net(input_ids=ids, labels=ids).loss, device)


def dalle_pytorch(config: PriorConfig, batch: int, device: torch.device) -> Step:
    """DALLE-pytorch's transformer of as many weights (13 dim^2 a layer), without its heads.

    Its package's __init__ imports unneeded packages and is bypassed.
    Raises: ImportError if it is not installed.
    """
    place = importlib.util.find_spec("dalle_pytorch")
    if place is None or place.submodule_search_locations is None:
        raise ImportError("No module named 'dalle_pytorch'")
    package = types.ModuleType("dalle_pytorch")
    package.__path__ = list(place.submodule_search_locations)
    sys.modules["dalle_pytorch"] = package
    from dalle_pytorch.transformer import Transformer  # noqa: PLC0415 - optional peer

    with device:
        net = Transformer(
            dim=config.dim,
            depth=config.layers,
            seq_len=config.length,
            causal=True,
            heads=config.heads,
            dim_head=config.dim // config.heads,
            ff_mult=3,
            image_fmap_size=config.grid,
            attn_types=("axial_row", "axial_row", "axial_col", "axial_row"),
            rotary_emb=False,
        )
        x = torch.randn(batch, config.length, config.dim)
    return _step(net, lambda: net(x).float().square().mean(), device)


def _step(net: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> Step:
    """bf16 autocast and fused AdamW, no recompute."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()

    return step


PEERS = {"transformers GPT-NeoX": gpt_neox, "DALLE-pytorch": dalle_pytorch}
