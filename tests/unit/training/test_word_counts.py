"""Words counted by several workers give the tokenizer of one process that reads every caption."""

import json
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.support.counted import CountedStore
from core.errors import ConfigError, CorruptError, InputError
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import PackConfig
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.raw_shards import RawShards
from data_pipeline.packing.pack import pack
from data_pipeline.stored_captions import StoredCaptions
from data_pipeline.streaming.stream import stored_records
from data_pipeline.text.bpe import FILE, Spaces, count_words, train_bpe
from tests.catalogued import small_set
from tests.in_place import img2dataset, in_place_set, kept_by, written
from training.config import BPETrain
from training.tokenizer import train_tokenizer
from training.word_counts import CountJob, tasks_of

ODD = ["é è ünïcode", "你好 你 😀", "tab\tx", " lead", "trail ", "", "a", "x1y2 zz", "A b", "a  bb"]
PATTERNS: dict[Spaces, str] = {"alone": "[a-z]+|[^a-z]", "joined": " ?[a-z]+|[^a-z]"}


def _by_the_library(captions: Iterable[str], vocabulary: int, spaces: Spaces) -> Tokenizer:
    """The library alone splits and counts."""
    tokenizer = Tokenizer(models.BPE())
    runs = pre_tokenizers.Split(Regex(PATTERNS[spaces]), behavior="isolated")
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([runs, symbols])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    """Pairs with one to three captions, in shards of 7."""
    root = tmp_path_factory.mktemp("pairs")
    shapes = FolderStore(root / "shapes")
    pack("shapes", shapes, PackConfig(count=80, validation=0.2, pixels=16))
    (root / "in").mkdir()
    for number, record in enumerate(stored_records(RawSource(shapes, "train"))):
        (root / "in" / f"{number:03d}.png").write_bytes(record.image)
        more = [record.caption, f"picture {number} of ünïque things", "thé same one"]
        (root / "in" / f"{number:03d}.txt").write_text("\n".join(more[: 1 + number % 3]))
    store = FolderStore(root / "raw")
    pack(str(root / "in"), store, PackConfig(validation=0.1, shard_pairs=7, block=3))
    return store


def _captions(pairs: FolderStore) -> list[str]:
    return [text for r in stored_records(RawSource(pairs, "train")) for text in r.captions]


@pytest.mark.parametrize("spaces", PATTERNS)
def test_pins_counts_and_merges_of_the_library(spaces: Spaces, pairs: FolderStore) -> None:
    captions = [*_captions(pairs), *ODD * 30]
    ours = train_bpe(captions, 400, spaces)
    assert ours.to_str() == _by_the_library(captions, 400, spaces).to_str()
    assert count_words(["a bb, bb é"], "alone") == Counter({"bb": 2, "é": 1})
    assert count_words(["a bb, bb é"], "joined") == Counter({" bb": 2, "é": 1})


@pytest.mark.parametrize("most", [10**6, 60, 41, 40, 1])
def test_workers_learn_what_one_process_reads(
    pairs: FolderStore, tmp_path: Path, most: int
) -> None:
    settings = BPETrain(
        data=str(pairs.root), out=tmp_path, vocabulary=300, max_captions=most, task_captions=10
    )
    source = StoredCaptions(pairs, "train")
    learned: list[str] = []

    def work(number: int) -> None:
        job = CountJob(source, settings, JobWorker(number=number, count=3))
        learned.append(job.run().to_str())

    threads = [threading.Thread(target=work, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = _by_the_library(_captions(pairs)[:most], 300, "alone").to_str()
    assert learned == [expected] * 3
    sizes = [task.size for task in tasks_of(source.shards, settings)]
    assert min(sizes[:-1], default=10) >= 10 and (len(sizes) > 2) == (most > 28)


def test_a_larger_vocabulary_counts_nothing_again(pairs: FolderStore, tmp_path: Path) -> None:
    settings = BPETrain(data=str(pairs.root), out=tmp_path, vocabulary=300, task_captions=10)
    train_tokenizer(settings)
    first = (tmp_path / FILE).read_bytes()
    assert first == _by_the_library(_captions(pairs), 300, "alone").to_str(pretty=True).encode()
    counted = CountedStore(pairs)
    larger = BPETrain(data=str(pairs.root), out=tmp_path, vocabulary=310, task_captions=10)
    job = CountJob(StoredCaptions(counted, "train"), larger, JobWorker(number=0, count=1))
    assert job.run().get_vocab_size() == 310
    assert not any(name.endswith(".tar") for name in counted.names_read)
    with pytest.raises(InputError, match="holds another tokenizer, of 300 entries"):
        train_tokenizer(larger)
    assert (tmp_path / FILE).read_bytes() == first
    (tmp_path / FILE).write_text("damaged")
    train_tokenizer(settings)  # from its result, without another count
    assert (tmp_path / FILE).read_bytes() == first


def test_a_catalogue_gives_the_captions_without_a_picture(tmp_path: Path) -> None:
    """Of a set with duplicates and rejects: some blocks lack pairs, and one is left out."""
    store, _ = small_set(tmp_path)
    for split in ("train", "validation"):
        counted = CountedStore(store)
        captions = StoredCaptions(counted, split)
        numbers = range(len(captions.shards.manifest.shards))
        texts = [list(captions.of(number)) for number in numbers]
        assert not any(name.endswith(".tar") for name in counted.names_read)
        stored = RawShards(store, split)
        assert texts == [[t for r in stored.records(n) for t in r.captions] for n in numbers]
        assert captions.shards.manifest.rejects and any(
            shard.pairs for shard in captions.shards.manifest.shards
        )
    part = store.names("catalogue/000001")[0]
    store.put(part, store.get(part)[:-1])
    with pytest.raises(CorruptError, match=r"catalogue/000001\.parquet is missing or differs"):
        list(StoredCaptions(store, "train").of(1))


def test_ids_of_a_set_in_place_are_those_of_its_records(tmp_path: Path) -> None:
    """Its workers left pairs out by a mask of their own, and the set leaves out more."""
    members = img2dataset(0, 40)
    bad = [(name, b"bad" if name.endswith("3.png") else data) for name, data in members]
    tars = [written(tmp_path, "a.tar", bad), written(tmp_path, "b.tar", img2dataset(40, 20))]
    whole, left = FolderStore(tmp_path / "whole"), FolderStore(tmp_path / "left")
    in_place_set(whole, tars)
    some = lambda key: int(key[-2:]) // 4 % 3 > 0 and key[-1] != "7"  # noqa: E731
    in_place_set(left, tars, lambda split: kept_by(whole, split, some))
    for store in (whole, left):
        captions = StoredCaptions(store, "train")
        shards = captions.shards
        for number in range(len(shards.manifest.shards)):
            expected = [record.id for record in shards.records(number)]
            assert captions._ids(number).tolist() == expected and expected
            assert list(captions.of(number)) == [r.caption for r in shards.records(number)]
    assert shards.manifest.samples < 35


def test_damaged_counts_are_named(pairs: FolderStore, tmp_path: Path) -> None:
    settings = BPETrain(data=str(pairs.root), out=tmp_path, vocabulary=300, task_captions=10)
    train_tokenizer(settings)
    store = FolderStore(tmp_path)
    name = next(name for name in store.names("counts/") if name.count("/") == 1)
    body = json.loads(store.get(name))
    store.put(name, json.dumps({**body, "captions": 1}).encode())
    for result in store.names("counts/tokenizer-"):
        store.delete(result)
    with pytest.raises(CorruptError, match=r"is damaged; delete .*counts/"):
        train_tokenizer(settings)


def test_one_process_reads_a_file_of_captions(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_text("a small red circle\n" * 20)
    with pytest.raises(ConfigError, match="one process reads --texts"):
        train_tokenizer(BPETrain(texts=texts, out=tmp_path / "bpe", worker="1/2"))
