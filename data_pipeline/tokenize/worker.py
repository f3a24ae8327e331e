"""One worker of the token job: input shard -> output shard, named by what it was made from.

    train/<hash>.tar           blocks of records
    train/<hash>.index.json    offset, length, records, crc32 of each block
    train/_done/<hash>.json    the shard's description, put last and only once

Workers may be killed and started again, twice at once or with another count: an output that is
there is never made again, and whoever commits second reads back what the first one wrote.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from core.errors import CorruptError, InputError, StoreError
from core.files import canonical_json, sha256
from core.keys import key_int
from core.log import LOG
from core.settings import to_json
from core.store import Store
from data_pipeline.bpe import encode
from data_pipeline.config import TokenizeConfig
from data_pipeline.images import decode_rgb, square
from data_pipeline.manifest import RAW, TOKENS, Manifest, Shard, read_manifest, write_manifest
from data_pipeline.raw import RawRecord, RawSource
from data_pipeline.shards import build_tar, list_members, put_shard, read_index
from data_pipeline.tokens import TokenRecord, encode_block, index_blocks
from models.dvae import DVAE

SPLITS = ("train", "validation")
DONE, REQUEST = "_done/", "request.json"


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen models of a token job."""

    dvae: DVAE
    dvae_hash: str
    tokenizer: Tokenizer
    tokenizer_hash: str

    def facts(self, config: TokenizeConfig) -> dict[str, object]:
        """What makes two token data sets comparable."""
        return {
            "dvae": self.dvae_hash,
            "tokenizer": self.tokenizer_hash,
            "grid": self.dvae.config.grid,
            "image_vocabulary": self.dvae.config.codebook,
            "text_vocabulary": self.tokenizer.get_vocab_size(),
            "variants": 1,
            "block": config.block,
        }


def run_worker(
    raw: Store,
    tokens: Store,
    encoders: Encoders,
    config: TokenizeConfig,
    worker: int,
    workers: int,
    again: bool = False,
) -> int:
    """Make every shard of this worker (i % workers == worker) that nobody has made yet.

    `again` reads what is there, and makes damaged shards anew. The last worker to finish writes
    the manifests. Returns the number of shards made here.
    Raises: InputError if TOKENS holds tokens of other pairs or models.
    """
    torch.set_num_threads(config.threads)
    _claim(raw, tokens, encoders, config)
    made = 0
    for split in SPLITS:
        source = RawSource(raw, split, config.block)
        jobs = [(shard, _name(shard, encoders, config)) for shard in source.manifest.shards]
        mine = jobs[worker::workers]
        for shard, name in mine:
            if not _is_done(tokens, split, name, again):
                _make(raw, tokens, split, shard, name, encoders, config)
                made += 1
                LOG.info("worker %d/%d: %s/%s -> %s", worker, workers, split, shard.name, name[:12])
    finish(raw, tokens, encoders, config)
    return made


def finish(raw: Store, tokens: Store, encoders: Encoders, config: TokenizeConfig) -> bool:
    """Write the manifests if every shard is done; says whether they are there."""
    complete = True
    for split in SPLITS:
        source = read_manifest(raw, f"{split}/", RAW)
        done = [f"{split}/{DONE}{_name(s, encoders, config)}.json" for s in source.shards]
        present = set(tokens.names(f"{split}/{DONE}"))
        if not present.issuperset(done):
            complete = False
            continue
        shards = [Shard(**json.loads(tokens.get(name))) for name in done]
        samples = sum(shard.samples for shard in shards)
        if samples != source.samples:
            raise InputError(
                f"{tokens.url}/{split} has {samples} records for {source.samples} pairs"
            )
        facts = {**encoders.facts(config), "raw": source.fingerprint, "split": split}
        manifest = Manifest(format=TOKENS, shards=shards, samples=samples, facts=facts, rejects={})
        write_manifest(tokens, f"{split}/", manifest)
    return complete


def _make(
    raw: Store,
    tokens: Store,
    split: str,
    shard: Shard,
    name: str,
    encoders: Encoders,
    config: TokenizeConfig,
) -> None:
    data = raw.get(f"{split}/{shard.name}")
    if sha256(data) != shard.sha256:
        raise CorruptError(
            f"{raw.url}/{split}/{shard.name} differs from its manifest (sha256 {sha256(data)}, "
            f"expected {shard.sha256}); restore it or run its `tapir pack` with --again"
        )
    source = RawSource(raw, split, config.block)
    blocks = [i for i in range(len(source.sizes)) if source.shard_of(i).name == shard.name]
    groups = [_encode(source.read(i), encoders, config) for i in blocks]
    samples = [
        {"__key__": f"block-{i:06d}", "bin": encode_block(group)} for i, group in enumerate(groups)
    ]
    tar = build_tar(samples)
    index = index_blocks(tar, list_members(tar), [len(group) for group in groups])
    written = put_shard(tokens, f"{split}/", f"{name}.tar", tar, index)
    done = canonical_json(to_json(written))
    tokens.put(f"{split}/{DONE}{name}.json", done, if_absent=True)


@torch.no_grad()
def _encode(
    records: list[RawRecord], encoders: Encoders, config: TokenizeConfig
) -> list[TokenRecord]:
    codes = codes_of(records, encoders.dvae, config.batch)
    found = []
    for record, image in zip(records, codes, strict=True):
        text = encode(encoders.tokenizer, record.caption)
        found.append(
            TokenRecord(id=key_int(record.key), image=image, text=np.asarray(text, np.uint16))
        )
    return found


def codes_of(records: list[RawRecord], dvae: DVAE, batch: int) -> np.ndarray:
    """The dVAE's codes of raw pairs: (n, grid * grid) uint16."""
    found = []
    for start in range(0, len(records), batch):
        pictures = pictures_of(records[start : start + batch], dvae.config.pixels)
        found.append(dvae.tokens(pictures).numpy().astype(np.uint16))
    return np.concatenate(found)


def pictures_of(records: list[RawRecord], pixels: int) -> torch.Tensor:
    """Decoded, squared pictures: (n, 3, pixels, pixels) float32 in [0, 1]."""
    arrays = [square(decode_rgb(record.image, record.key), pixels) for record in records]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _name(shard: Shard, encoders: Encoders, config: TokenizeConfig) -> str:
    return sha256(canonical_json({"input": shard.sha256, **encoders.facts(config), "v": TOKENS}))


def _is_done(tokens: Store, split: str, name: str, check: bool) -> bool:
    """Say whether a shard is there, and (if asked) whole; a damaged one's record is taken back."""
    record = f"{split}/{DONE}{name}.json"
    if not tokens.exists(record):
        return False
    if not check:
        return True
    shard = Shard(**json.loads(tokens.get(record)))
    prefix = f"{split}/"
    try:
        read_index(tokens, prefix, shard)
        if sha256(tokens.get(prefix + shard.name)) == shard.sha256:
            return True
    except (CorruptError, StoreError) as error:
        LOG.info("%s", error)
    LOG.info("%s%s is damaged: made anew", prefix, shard.name)
    return False


def _claim(raw: Store, tokens: Store, encoders: Encoders, config: TokenizeConfig) -> None:
    """Take TOKENS for these pairs and models; the first job wins."""
    pairs = {split: read_manifest(raw, f"{split}/", RAW).fingerprint for split in SPLITS}
    wanted = canonical_json({**encoders.facts(config), "raw": pairs})
    if tokens.put(REQUEST, wanted, if_absent=True) or tokens.get(REQUEST) == wanted:
        return
    raise InputError(
        f"{tokens.url} holds tokens of other pairs, or of another dVAE, tokenizer or block size; "
        "choose an empty place for the tokens"
    )
