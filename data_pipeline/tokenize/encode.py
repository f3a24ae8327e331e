"""Raw pairs -> token records; threads decode pictures while the image tokenizer encodes."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from core.errors import InputError
from core.keys import keyed_rng
from data_pipeline.config import TokenizeConfig
from data_pipeline.formats.raw import RawRecord
from data_pipeline.formats.tokens import TokenRecord
from data_pipeline.images.crops import square, tokenizer_crop
from data_pipeline.images.decode import decode_rgb
from data_pipeline.text.bpe import encode
from models.tokenizers.config import TokenizerFacts
from models.tokenizers.protocol import ImageTokenizer
from parallel.precision import Numerics

TOKENS_TOGETHER = 8192
"""Maximum tokens of a batch of pictures in the encoder, to bound its memory."""
MOST_ENTRIES = 65_536
"""Maximum vocabulary of a tokenizer: ids are uint16."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen models of a token job."""

    images: ImageTokenizer
    tokenizer: Tokenizer
    tokenizer_hash: str
    numerics: Numerics

    def problems(self, config: TokenizeConfig) -> list[str]:
        """Reasons why records cannot hold these models' output, or these settings not apply."""
        problems, entries = self.images.facts.problems(), self.tokenizer.get_vocab_size()
        if entries > MOST_ENTRIES:
            problems.append(
                f"the tokenizer has {entries} entries, and records hold {MOST_ENTRIES} (uint16); "
                "train one with a smaller --vocabulary"
            )
        if config.variants > 1 and self.images.facts.crop == "center":
            problems.append(
                f"variants={config.variants} would all be the same: this image tokenizer wants the "
                "central square; leave it out, or import it with --crop random"
            )
        return problems

    def facts(self, config: TokenizeConfig) -> dict[str, object]:
        """Facts that must be equal for two token data sets to be comparable.

        fp32 codes are equal on all devices; 16-bit codes depend on the device.
        """
        device = self.images.device.type
        of_device = {"device": device} if config.precision != "fp32" and device != "cpu" else {}
        return {
            **self.images.facts.manifest(),
            "tokenizer": self.tokenizer_hash,
            "precision": config.precision,
            "text_vocabulary": self.tokenizer.get_vocab_size(),
            "variants": config.variants,
            "block": config.block,
            **of_device,
        }


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result of encoding a shard."""

    variants: list[list[TokenRecord]]
    """For each crop, the records of the usable pairs, in order."""
    rejects: list[dict[str, str]]
    """key, kind and reason of each unusable pair."""

    @property
    def kinds(self) -> dict[str, int]:
        """Rejects by kind."""
        return dict(Counter(row["kind"] for row in self.rejects))


def encode_pairs(
    records: Iterable[RawRecord],
    encoders: Encoders,
    config: TokenizeConfig,
    progress: dict[str, Any],
) -> Encoded:
    """Encode a shard's pairs; `progress["pairs"]` counts them."""
    variants: list[list[TokenRecord]] = [[] for _ in range(config.variants)]
    rejects: list[dict[str, str]] = []
    for batch in _cropped(records, encoders.images.facts, config):
        usable = []
        for record, cropped in batch:
            if isinstance(cropped, InputError):
                kind = "small" if isinstance(cropped, _SmallError) else "image"
                rejects.append({"key": record.key, "kind": kind, "reason": str(cropped)})
            else:
                usable.append((record, cropped))
        if usable:
            crops = np.concatenate([cropped for _, cropped in usable])
            codes = codes_of(crops, encoders.images).reshape(len(usable), config.variants, -1)
            for (record, _), rows in zip(usable, codes, strict=True):
                text, *others = (
                    np.asarray(encode(encoders.tokenizer, caption), np.uint16)
                    for caption in record.captions
                )
                for number, image in enumerate(rows):
                    variants[number].append(
                        TokenRecord(id=record.id, image=image, text=text, others=tuple(others))
                    )
        progress["pairs"] = progress.get("pairs", 0) + len(batch)
    return Encoded(variants=variants, rejects=rejects)


class _SmallError(InputError):
    """A picture below the tokenizer's size."""


def _crops(
    record: RawRecord, facts: TokenizerFacts, variants: int
) -> NDArray[np.uint8] | InputError:
    """Keyed crops of a picture, (variants, pixels, pixels, 3), or the error."""
    try:
        image = decode_rgb(record.image, record.key)
    except InputError as error:
        return error
    if min(image.shape[:2]) < facts.pixels:
        return _SmallError(f"{record.key} has {image.shape[1]}x{image.shape[0]} pixels")
    rngs = [keyed_rng(record.id, variant, "crop") for variant in range(variants)]
    return np.stack([tokenizer_crop(image, facts.pixels, facts.crop, rng) for rng in rngs])


def _cropped(
    records: Iterable[RawRecord], facts: TokenizerFacts, config: TokenizeConfig
) -> Iterator[list[tuple[RawRecord, NDArray[np.uint8] | InputError]]]:
    """Batches of records with their crops; the next two batches are prefetched."""
    together = max(1, config.batch // config.variants)
    rest = iter(records)
    waiting: deque[list[tuple[RawRecord, Future[Any]]]] = deque()
    with ThreadPoolExecutor(config.readers, "decode") as pool:
        while part := list(islice(rest, together)):
            rows = [(r, pool.submit(_crops, r, facts, config.variants)) for r in part]
            waiting.append(rows)
            if len(waiting) > 2:
                yield [(record, future.result()) for record, future in waiting.popleft()]
        while waiting:
            yield [(record, future.result()) for record, future in waiting.popleft()]


def codes_of(pictures: NDArray[np.uint8], images: ImageTokenizer) -> NDArray[np.uint16]:
    """Codes of square pictures: (n, S, S, 3) -> (n, rows * columns)."""
    together = max(1, TOKENS_TOGETHER // images.facts.tokens)
    tokens = [images.codes(part.to(images.device)) for part in to_tensor(pictures).split(together)]
    return torch.cat(tokens).cpu().numpy().astype(np.uint16)


def pictures_of(records: Sequence[RawRecord], pixels: int) -> torch.Tensor:
    """Decode and square pictures: (n, 3, pixels, pixels) float32 in [0, 1].

    Raises: InputError if one cannot be decoded.
    """
    return squares_of([decode_rgb(record.image, record.key) for record in records], pixels)


def squares_of(pictures: Sequence[NDArray[np.uint8]], pixels: int) -> torch.Tensor:
    """Square pictures: (n, 3, pixels, pixels) float32 in [0, 1]."""
    return to_tensor(np.stack([square(picture, pixels) for picture in pictures]))


def to_bytes(pictures: torch.Tensor) -> NDArray[np.uint8]:
    """(n, 3, S, S) in [0, 1], clipped to it -> (n, S, S, 3) uint8, on the host."""
    whole = (pictures * 255).round().clamp(0, 255).byte()
    return np.asarray(whole.permute(0, 2, 3, 1).cpu().numpy())


def to_tensor(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """(n, S, S, 3) uint8 -> (n, 3, S, S) float32 in [0, 1]."""
    scaled = np.divide(pictures, np.float32(255), dtype=np.float32)  # without torch's threads
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)
