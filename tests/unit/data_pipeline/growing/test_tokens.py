"""Tokens of a raw set that grows: new shards alone are encoded, as the next version."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import InputError
from core.storage.store import FolderStore, Store
from core.workers import JobWorker
from data_pipeline.config import PackConfig, TokenizeConfig
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.manifest import INDEX, RAW, SPLITS, TOKENS, read_manifest
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.jobs.ledger import DONE
from data_pipeline.jobs.status import job_status
from data_pipeline.packing.pack import pack
from data_pipeline.text.bpe import train_bpe
from data_pipeline.tokenize.encode import Encoders
from data_pipeline.tokenize.worker import Worker
from models.config import DVAEConfig
from models.dvae import DVAE
from models.tokenizers.protocol import DVAETokenizer
from parallel.device import CPU
from parallel.precision import set_numerics

CONFIG = PackConfig(validation=0.3, shard_pairs=8)


def _pictures(folder: Path, first: int, count: int) -> str:
    folder.mkdir(parents=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{i:04d}.png").write_bytes(buffer.getvalue())
        (folder / f"{i:04d}.txt").write_text(f"a red circle {i}")
    return str(folder)


def _append(raw: Store, folder: Path, first: int, count: int) -> dict[str, int]:
    """Append pairs to a raw set as its next version; returns the new shards of each split."""
    before = {split: len(read_manifest(raw, f"{split}/", RAW).shards) for split in SPLITS}
    made = pack(_pictures(folder, first, count), raw, CONFIG, append=True)
    return {split: len(manifest.shards) - before[split] for split, manifest in made.items()}


@cache
def encoders() -> Encoders:
    """A tiny dVAE of 16 pixels, and a tokenizer."""
    return Encoders(
        images=DVAETokenizer(DVAE(DVAEConfig(pixels=16, width=4, codebook=16, code_width=8)), "d"),
        tokenizer=train_bpe(["a red circle"], 300),
        tokenizer_hash="t",
        numerics=set_numerics(CPU),
    )


def _worker(raw: Store, tokens: Store, **changes: int) -> Worker:
    config, member = TokenizeConfig(block=4, **changes), JobWorker(number=0, count=1)
    return Worker(raw, tokens, encoders(), config, member)


def _files(store: FolderStore) -> dict[str, bytes]:
    return {name: store.get(name) for name in store.names() if not name.endswith("/")}


def _records(tokens: Store, split: str) -> list[tuple[int, bytes, bytes]]:
    source = TokenSource(tokens, split)
    records = (record for block in range(len(source.sizes)) for record in source.read(block))
    return [(record.id, record.image.tobytes(), record.text.tobytes()) for record in records]


@pytest.fixture
def raw(tmp_path: Path) -> FolderStore:
    store = FolderStore(tmp_path / "raw")
    pack(_pictures(tmp_path / "pictures", 0, 40), store, CONFIG)
    return store


@pytest.mark.seconds
def test_new_shards_alone_are_encoded(raw: FolderStore, tmp_path: Path) -> None:
    tokens, fresh = FolderStore(tmp_path / "tokens"), FolderStore(tmp_path / "fresh")
    _worker(raw, tokens).run()
    before = _files(tokens)
    first = read_manifest(tokens, "train/", TOKENS)
    new = _append(raw, tmp_path / "more", 40, 30)
    assert _worker(raw, tokens).run() == sum(new.values())
    assert _worker(raw, tokens).run() == 0
    _worker(raw, fresh).run()
    for split in SPLITS:
        assert _records(tokens, split) == _records(fresh, split)
        manifest = read_manifest(tokens, f"{split}/", TOKENS)
        assert manifest.version == 2
        assert manifest.facts["raw"] == read_manifest(raw, f"{split}/", RAW).fingerprint
    after = _files(tokens)
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {f"{split}/manifest.json" for split in SPLITS}
    assert read_manifest(tokens, "train/", TOKENS, 1).fingerprint == first.fingerprint
    rows = job_status(tokens)
    assert all(row.finished for row in rows) and sum(row.pairs for row in rows) == 70


@pytest.mark.seconds
def test_a_version_that_was_begun_is_finished_first(raw: FolderStore, tmp_path: Path) -> None:
    tokens, undisturbed = FolderStore(tmp_path / "tokens"), FolderStore(tmp_path / "undisturbed")
    worker = _worker(raw, undisturbed)
    worker.run()
    begun = _files(undisturbed)
    new = _append(raw, tmp_path / "more", 40, 30)
    worker.run()
    for name, data in begun.items():  # a worker of version 1 that was killed: markers, no manifests
        if name.rpartition("/")[2] not in ("manifest.json", INDEX, IDS):
            tokens.put(name, data)
    lost = tokens.names(f"train/{DONE}")[1]
    tokens.delete(lost)
    assert not any(row.finished for row in job_status(tokens))
    assert _worker(raw, tokens).run() == 1 + sum(new.values())
    assert _files(tokens) == _files(undisturbed)


@pytest.mark.seconds
def test_other_pairs_and_other_settings_are_refused(raw: FolderStore, tmp_path: Path) -> None:
    tokens = FolderStore(tmp_path / "tokens")
    _worker(raw, tokens).run()
    _append(raw, tmp_path / "more", 40, 30)
    before = _files(tokens)
    with pytest.raises(InputError, match="holds tokens of other pairs, or of another dVAE"):
        _worker(raw, tokens, variants=2).run()
    other = FolderStore(tmp_path / "other")
    pack(_pictures(tmp_path / "others", 100, 40), other, CONFIG)
    with pytest.raises(InputError, match="choose an empty place for the tokens"):
        _worker(other, tokens).run()
    assert _files(tokens) == before
