"""Pins of what is known of an image tokenizer: crops, defaults and sizes at their ends."""

from dataclasses import asdict

import pytest

from models.config import DVAEConfig
from models.tokenizers.config import TokenizerFacts, VQBody, VQConfig


def test_facts_are_those_of_the_sizes() -> None:
    """Of 16 pixels and 2 halvings: 4 x 4 tokens."""
    body = {"num_vq_embeddings": 50, "block_out_channels": [32, 32, 32]}
    sizes = VQConfig(pixels=16, head="nearest", unit_range=False, crop="center", body=body)
    of_sizes = {"pixels": 16, "rows": 4, "columns": 4, "codebook": 50, "crop": "center"}
    assert asdict(TokenizerFacts.of("vq", sizes, "d")) == {"kind": "vq", "digest": "d", **of_sizes}
    dvae = TokenizerFacts.of_dvae(DVAEConfig(pixels=16, groups=3, codebook=60), "e")
    assert dvae == TokenizerFacts(
        kind="dvae", digest="e", pixels=16, rows=4, columns=4, codebook=60, crop="random"
    )


def test_arguments_that_a_file_leaves_out_are_those_of_diffusers() -> None:
    """As in the signature of diffusers.VQModel."""
    assert asdict(VQBody()) == {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 3,
        "num_vq_embeddings": 256,
        "norm_num_groups": 32,
        "vq_embed_dim": None,
        "norm_type": "group",
        "mid_block_add_attention": True,
        "lookup_from_codebook": False,
    }


@pytest.mark.parametrize(
    ("channels", "groups", "problems"),
    [
        (1, 1, []),
        (3, 1, []),
        (3, 2, ["block_out_channels=[3] has 3, not a multiple of the 2 norm_num_groups"]),
        (0, 1, ["block_out_channels=[0] has 0, not a multiple of the 1 norm_num_groups"]),
        (5, 0, ["norm_num_groups=0 must be at least 1"]),
    ],
)
def test_channels_are_a_multiple_of_the_groups(
    channels: int, groups: int, problems: list[str]
) -> None:
    body = VQBody(block_out_channels=(channels,), norm_num_groups=groups)
    assert body.problems() == problems
