"""Weights of taming's VQGANs and of LlamaGen's VQ under the names of diffusers' VQModel.

Sizes are read from the shapes, so that no YAML is needed.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from core.errors import InputError
from models.tokenizers.config import (
    DOWN,
    DOWN_WITH_ATTENTION,
    UP,
    UP_WITH_ATTENTION,
    Head,
    ReadOptions,
    VQConfig,
)

PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
"""Beginnings of the names that are taken; discriminators, losses and averages are left out."""
_UNUSED = re.compile(r"quantize\.(.*\.)?(codebook_used|used|cluster_size|embed_avg)$")
"""Figures and averages of training."""
_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""Layers of an attention block by those of diffusers; the last four are of its older versions."""
_ATTENDS = re.compile(r"(.*attentions\.\d+\.)(\w+)\.(weight|bias)$")
_Rules = tuple[tuple[re.Pattern[str], str], ...]
_TAMING: _Rules = (
    (re.compile(r"encoder\.down\.(\d+)\."), r"encoder.down_blocks.\1."),
    (re.compile(r"decoder\.up\.(\d+)\."), r"decoder.up_blocks.\1."),
    (re.compile(r"\.block\."), ".resnets."),
    (re.compile(r"mid\.block_1"), "mid_block.resnets.0"),
    (re.compile(r"mid\.attn_1"), "mid_block.attentions.0"),
    (re.compile(r"mid\.block_2"), "mid_block.resnets.1"),
)
_LLAMAGEN: _Rules = (
    (re.compile(r"encoder\.conv_blocks"), "encoder.down_blocks"),
    (re.compile(r"decoder\.conv_blocks"), "decoder.up_blocks"),
    (re.compile(r"\.res\."), ".resnets."),
    (re.compile(r"mid\.0"), "mid_block.resnets.0"),
    (re.compile(r"mid\.1"), "mid_block.attentions.0"),
    (re.compile(r"mid\.2"), "mid_block.resnets.1"),
)
_BOTH: _Rules = (
    (re.compile(r"\.attn\."), ".attentions."),
    (re.compile(r"\.downsample\."), ".downsamplers.0."),
    (re.compile(r"\.upsample\."), ".upsamplers.0."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.norm_out\."), ".conv_norm_out."),
)
_MATRIX = re.compile(r"attentions\.\d+\.to_\w+(\.0)?\.weight$")
_UP = re.compile(r"decoder\.up_blocks\.(\d+)")
GROUPS = 32
"""Groups of every group norm, which the shapes do not tell."""


def of_taming(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a VQGAN, whose decoder counts its levels from the pictures."""
    renamed = _renamed(tensors, (*_TAMING, *_BOTH))
    levels = _count(renamed, "decoder.up_blocks.")

    def turned(name: str) -> str:
        return _UP.sub(lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)

    return {turned(name): value for name, value in renamed.items()}


def of_llamagen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a VQ model of LlamaGen."""
    return _renamed(tensors, (*_LLAMAGEN, *_BOTH))


def of_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention layers of older versions."""
    return _renamed(tensors, ())


def config_of(
    tensors: Mapping[str, Tensor], where: str, options: ReadOptions, head: Head
) -> VQConfig:
    """Read the sizes from the shapes of renamed weights.

    Raises: InputError if a tensor that tells them is missing or has other dimensions.
    """
    shape = partial(_shape, tensors, where)
    levels = range(_count(tensors, "encoder.down_blocks.") or 1)
    downs = [f"encoder.down_blocks.{i}." for i in levels]
    ups = [f"decoder.up_blocks.{i}." for i in levels]
    table = "quantize.embed.weight" if head == "gumbel" else "quantize.embedding.weight"
    codes, width = shape(table, 2)
    body = {
        "down_block_types": [
            DOWN_WITH_ATTENTION if _attends(tensors, down) else DOWN for down in downs
        ],
        "up_block_types": [UP_WITH_ATTENTION if _attends(tensors, up) else UP for up in ups],
        "block_out_channels": [shape(f"{down}resnets.0.conv1.weight", 4)[0] for down in downs],
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets."),
        "latent_channels": shape("post_quant_conv.weight", 4)[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": width,
        "norm_num_groups": GROUPS,
    }
    return VQConfig(
        pixels=options.pixels, crop=options.crop, head=head, unit_range=False, body=body
    )


def _shape(
    tensors: Mapping[str, Tensor], where: str, name: str, dimensions: int
) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(
            f"{where} holds no VQ tokenizer: {name} is missing; give a whole checkpoint, or name "
            "its kind by --from"
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise InputError(
            f"{where} holds no VQ tokenizer: {name} has the shape {shape}, not {dimensions} "
            "dimensions; give a whole checkpoint, or name its kind by --from"
        )
    return shape


def _renamed(tensors: Mapping[str, Tensor], rules: _Rules) -> dict[str, Tensor]:
    """The weights of the tokenizer, with the 1x1 convolutions of attention as matrices."""
    renamed = {}
    for name, value in tensors.items():
        if name.startswith(PARTS) and not _UNUSED.match(name):
            new = _name(name, rules)
            is_matrix = _MATRIX.search(new) and value.dim() == 4
            renamed[new] = value.flatten(1) if is_matrix else value
    return renamed


def _name(name: str, rules: _Rules) -> str:
    for pattern, new in rules:
        name = pattern.sub(new, name)
    if match := _ATTENDS.match(name):
        name = f"{match[1]}{_ATTENTION.get(match[2], match[2])}.{match[3]}"
    return name


def _attends(tensors: Iterable[str], block: str) -> bool:
    return any(name.startswith(f"{block}attentions.") for name in tensors)


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix."""
    rest = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({name.partition(".")[0] for name in rest})
