"""The autoregressive transformer over text and image tokens, as layers that a pipeline can cut.

The stream has text_length + grid * columns inputs: start-of-text, the text without its last token,
start-of-image, the image without its last token. Position i predicts token i. Padding has a learned
embedding per text position and is attended to, but is not a target of the text loss.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.banded import band_of, banded_attention
from models.attention.flexible import flexible_attention
from models.attention.masks import layer_kind
from models.attention.rotary import rotary_table, rotary_table_on, rotate
from models.config import PriorConfig
from models.counts import block_matrices
from models.initialization import draw_normal, init_normal
from parallel.engines.protocol import Layer, Program, Recomputed
from parallel.placement import tie
from parallel.scales import Branch
from parallel.tensor.layers import (
    EPS,
    ColumnLinear,
    HeadNorm,
    RowLinear,
    VocabularyEmbedding,
    VocabularyHead,
    place_in_stream,
)
from parallel.tensor.ops import TensorParallel

PAD = -1
"""Marks text positions after the caption."""

TABLES = ("embedding.text.table.weight", "embedding.image.table.weight")
"""Global names of the token embeddings, which tied output matrices are copies of."""
BRANCHES = ("attention", "mlp")
"""Resblocks of a layer, each with its own gradient scale."""


class PriorEmbedding(nn.Module):
    """Tokens -> states: (B, T) text ids and (B, I) codes -> (B, T + I, dim)."""

    def __init__(self, config: PriorConfig, tensor: TensorParallel) -> None:
        super().__init__()
        dim = config.dim
        self.config, self._tensor = config, tensor
        self.text = VocabularyEmbedding(config.text_vocabulary, dim, tensor)
        self.pad = nn.Embedding(config.text_length, dim)
        self.image = VocabularyEmbedding(config.image_vocabulary, dim, tensor)
        self.learned = config.positions == "learned"
        """Positions are added to the inputs; else queries and keys are rotated."""
        if self.learned:
            self.text_position = nn.Embedding(config.text_length, dim)
            self.row = nn.Embedding(config.grid, dim)
            self.column = nn.Embedding(config.grid_columns, dim)
        self.start = nn.Embedding(2, dim)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        text, image = self.embed_text(batch["text"]), self.embed_image(batch["image"])
        return self._tensor.assemble(torch.cat([text, image], dim=1))

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions: start-of-text, then the text shifted by one."""
        once = self._tensor.once
        tokens = self.text(text.clamp_min(0))
        pads = once(self.pad.weight)[None].expand_as(tokens)
        inputs = torch.where((text == PAD)[..., None], pads, tokens)
        start = once(self.start.weight)[0].expand(len(text), 1, -1)
        shifted = torch.cat([start, inputs[:, :-1]], dim=1)
        return shifted + once(self.text_position.weight) if self.learned else shifted

    def embed_image(self, image: Tensor) -> Tensor:
        """Inputs of the first image positions: start-of-image, then the codes shifted by one.

        Shapes: (B, n) codes -> (B, n, dim); only the first n - 1 codes are read.
        """
        count, once = image.shape[1], self._tensor.once
        start = once(self.start.weight)[1].expand(len(image), 1, -1)
        shifted = torch.cat([start, self.image(image[:, : count - 1])], dim=1)
        return shifted + once(self.positions())[:count] if self.learned else shifted

    def positions(self) -> Tensor:
        """Row + column embeddings in raster order, (grid * columns, dim)."""
        both = self.row.weight[:, None] + self.column.weight[None]
        return both.flatten(0, 1)


class PriorBlock(Recomputed):
    """A pre-norm attention resblock and a pre-norm MLP resblock.

    Keys have no bias: it would shift all logits of a query equally, which softmax cancels, and
    AdamW would turn the rounding noise of its zero gradient into full steps.
    """

    def __init__(self, config: PriorConfig, layer: int, tensor: TensorParallel) -> None:
        super().__init__()
        dim, head = config.dim, config.dim // config.heads
        self._head, self._tensor = head, tensor
        self.attention_norm = norm_of(config)
        self.q = ColumnLinear(dim, dim, tensor, head)
        self.k = ColumnLinear(dim, dim, tensor, head, bias=False)
        self.v = ColumnLinear(dim, dim, tensor, head)
        self.q_norm = HeadNorm(dim, tensor, head) if config.qk_norm else None
        self.k_norm = HeadNorm(dim, tensor, head) if config.qk_norm else None
        self.out = RowLinear(dim, dim, tensor, head)
        self.attention_branch = Branch()
        self.mlp_norm = norm_of(config)
        gated = config.mlp == "gated"
        self.gate = ColumnLinear(dim, config.hidden, tensor, bias=False) if gated else None
        self.up = ColumnLinear(dim, config.hidden, tensor, bias=not gated)
        self.down = RowLinear(config.hidden, dim, tensor)
        self.mlp_branch = Branch()
        shape = (layer_kind(layer, config.layers), *config.mask)
        self._shape, self._band = shape, band_of(*shape)
        self._turned: tuple[int, int, int, int] | None = None
        if config.positions == "rotary":
            self._turned = (config.text_length, config.grid, config.grid_columns, head)
            rotary_table(*self._turned)  # here, so that it holds values in a rehearsal too

    def forward(self, x: Tensor) -> Tensor:
        return self.run_branch(self._transform, self.run_branch(self._look_back, x))

    def _look_back(self, x: Tensor) -> Tensor:
        """The attention resblock."""
        q, k, v = self._project(self.attention_branch.enter(x))
        attended = self.run_cheap(self._attended, q, k, v)
        return x + self.attention_branch.leave(self.out(attended))

    def _transform(self, x: Tensor) -> Tensor:
        """The MLP resblock."""
        return x + self.mlp_branch.leave(self._mlp(self.mlp_branch.enter(x)))

    def branches(self) -> dict[str, tuple[Branch, list[nn.Parameter]]]:
        """The two resblocks' branches and parameters, for gradient scales."""
        attention = (
            *(self.attention_norm, self.q, self.k, self.v, self.q_norm, self.k_norm, self.out),
        )
        mlp = (self.mlp_norm, self.gate, self.up, self.down)
        return {
            "attention": (self.attention_branch, _parameters(attention)),
            "mlp": (self.mlp_branch, _parameters(mlp)),
        }

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu":
            return banded_attention(q, k, v, self._band)
        return flexible_attention(q, k, v, *self._shape)

    @contextmanager
    def _entered(self, norm: nn.Module, x: Tensor, uses: int) -> Iterator[tuple[Tensor, ...]]:
        """Normed states for `uses` linears, which are called in the context."""
        fused = isinstance(norm, nn.LayerNorm)  # keeps x alone, and two numbers a position
        copies = self._tensor.enter(norm(x) if fused else self.run_cheap(norm, x), uses)
        with self.rebuilt(copies[0], lambda y: self._tensor.enter(norm(y))[0], x):
            yield copies

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, S, channels of this rank)."""
        with self._entered(self.attention_norm, x, 3) as (a, b, c):
            return self.q(a), self.k(b), self.v(c)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._by_head(*self._project(x))

    def _by_head(self, *channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.unflatten(2, (-1, self._head)) for x in channels)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self._turned is not None:
            turns = rotary_table_on(q.device, *self._turned)
            q, k = rotate(q, turns), rotate(k, turns)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attended(self, *channels: Tensor) -> Tensor:
        return self._attend(*self._by_head(*channels)).transpose(1, 2).flatten(2)

    def _join(self, attended: Tensor) -> Tensor:
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _mlp(self, x: Tensor) -> Tensor:
        lines = [line for line in (self.gate, self.up) if line is not None]
        with self._entered(self.mlp_norm, x, len(lines)) as copies:
            given = [line(copy) for line, copy in zip(lines, copies, strict=True)]
        gated = self.gate is not None
        wide = self.run_cheap(_gated, *given) if gated else _gelu(*given)
        with self.rebuilt(wide, _gated if gated else _gelu, *given):
            out: Tensor = self.down(wide)
        return out


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gated(gate: Tensor, x: Tensor) -> Tensor:
    return F.silu(gate) * x


def norm_of(config: PriorConfig) -> nn.Module:
    """A norm of the residual stream."""
    rms = config.norm == "rms"
    norm = nn.RMSNorm(config.dim, eps=EPS) if rms else nn.LayerNorm(config.dim)
    for parameter in norm.parameters():
        place_in_stream(parameter)
    return norm


def _parameters(modules: Iterable[nn.Module | None]) -> list[nn.Parameter]:
    return [p for module in modules if module is not None for p in module.parameters()]


@dataclass(frozen=True, kw_only=True)
class PriorLogits:
    """Text logits over the text vocabulary, image logits over the codebook.

    Under tensor parallelism the last axis is this rank's part of the vocabulary.
    """

    text: Tensor
    image: Tensor
    tensor: TensorParallel


class PriorHead(nn.Module):
    """States -> logits, split: text positions over text, image positions over codes."""

    def __init__(self, config: PriorConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.text_length = config.text_length
        self._tensor = tensor
        self.norm = norm_of(config)
        text, image = TABLES if config.tied else ("", "")
        self.text = VocabularyHead(config.dim, config.text_vocabulary, tensor, text)
        self.image = VocabularyHead(config.dim, config.image_vocabulary, tensor, image)

    def forward(self, x: Tensor) -> PriorLogits:
        """Logits in fp32, whatever the precision of the blocks (the paper, appendix D).

        Under bf16 the matmuls of the backward pass are in bf16: docs/decisions/007.
        """
        device = x.device.type
        half = torch.is_autocast_enabled(device)
        half = half and torch.get_autocast_dtype(device) == torch.bfloat16
        with torch.autocast(device, enabled=False):
            (x,) = self._tensor.enter(self.norm(x.float()))
            text, image = x[:, : self.text_length], x[:, self.text_length :]
            logits = self.text(text, half), self.image(image, half)
            return PriorLogits(text=logits[0], image=logits[1], tensor=self._tensor)


def prior_layers(
    config: PriorConfig, seed: int, tensor: TensorParallel | None = None
) -> list[Layer]:
    """The named layers of a prior; initial weights are keyed by seed and parameter name.

    Matrices start with standard deviation dim^-1/2 (0.016 at the paper's width), output projections
    of resblocks with that / sqrt(number of resblocks). A fixed 0.02 makes narrow models learn
    slowly: docs/LOG.md. A layer's cost is its multiplications per position.
    """
    group = tensor or TensorParallel()
    std = config.dim**-0.5
    deep = std / (2 * config.layers) ** 0.5
    scales = {"out.weight": deep, "down.weight": deep, "weight": std}

    def layer(
        name: str, make: Callable[[], nn.Module], cost: int, branches: tuple[str, ...] = ()
    ) -> Layer:
        def build() -> nn.Module:
            module = make()
            init_normal(module, seed, scales, f"{name}.")
            return module

        draw = partial(draw_normal, seed, scales, f"{name}.")
        return Layer(name=name, build=build, draw=draw, cost=cost, branches=branches)

    dim, length = config.dim, max(config.length, 1)
    block_cost = block_matrices(config) + dim * length
    entries = config.text_length * config.text_vocabulary
    entries += config.image_length * config.image_vocabulary
    layers = [layer("embedding", lambda: PriorEmbedding(config, group), dim)]
    for i in range(config.layers):
        make = partial(PriorBlock, config, i + 1, group)
        layers.append(layer(f"block{i:03d}", make, block_cost, BRANCHES))
    head_cost = dim * entries // length
    return [*layers, layer("head", lambda: PriorHead(config, group), head_cost)]


def build_prior(config: PriorConfig, seed: int = 0) -> nn.ModuleDict:
    """All layers of a prior on one process."""
    layers = nn.ModuleDict({layer.name: layer.build() for layer in prior_layers(config, seed)})
    tie(layers)  # type: ignore[arg-type]
    return layers


def prior_program(config: PriorConfig, seed: int, tensor: TensorParallel | None = None) -> Program:
    """The program to train: layers, loss, and the matrices that PowerSGD may compress."""
    runs = tensor.size if tensor is not None and tensor.sequence else 1
    return Program(
        layers=prior_layers(config, seed, tensor),
        loss=partial(prior_loss, text_weight=config.text_weight),
        losses=LOSSES,
        compressed=COMPRESSED,
        state=lambda batch: (len(batch["text"]), config.length // runs, config.dim),
        tied=TABLES if config.tied else (),
    )


COMPRESSED = tuple(f"{name}.weight" for name in ("q", "k", "v", "out", "gate", "up", "down"))
"""Endings of the matrices whose gradients PowerSGD compresses (appendix E)."""


LOSSES = ("loss", "text_loss", "image_loss")
"""Keys of `prior_loss`, in order."""


def prior_loss(
    logits: PriorLogits, batch: dict[str, Tensor], text_weight: float
) -> dict[str, Tensor]:
    """The weighted loss: text_weight * text + (1 - text_weight) * image cross-entropy.

    The text loss of a sample is the mean over its own tokens, so that a batch's loss is the mean
    over its samples, independent of their distribution over ranks.
    Units: nats per token.
    """
    text, tensor = batch["text"], logits.tensor
    real = (text != PAD).float()
    each = tensor.cross_entropy(logits.text.flatten(0, 1), text.clamp_min(0).flatten())
    counts = real.sum(1).clamp_min(1)
    text_loss = ((each.view_as(real) * real).sum(1) / counts).mean()
    image_loss = tensor.cross_entropy(logits.image.flatten(0, 1), batch["image"].flatten()).mean()
    loss = text_weight * text_loss + (1 - text_weight) * image_loss
    return {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}
