"""Trains the tokenizer, the only stage without the training loop."""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

from tokenizers import Tokenizer

from core.config import check
from core.errors import ConfigError, CorruptError, InputError
from core.files.atomic import held
from core.files.out_folder import refuse_others_folder
from core.log import LOG
from core.storage.store import open_store
from core.workers import job_worker_of
from data_pipeline.stored_captions import StoredCaptions
from data_pipeline.text.bpe import count_words, learn_merges, load_tokenizer, save_tokenizer
from data_pipeline.text.captions import clean_caption, is_visible
from data_pipeline.text.words import known_words, save_words
from training.config import BPETrain
from training.word_counts import CountJob


def train_tokenizer(settings: BPETrain) -> None:
    """Learn merges from captions and write tokenizer.json; one of any number of workers.

    Raises: InputError if there is no caption, or if the folder has another tokenizer.
    """
    check(settings.problems())
    refuse_others_folder(settings.out, "train bpe")
    member = job_worker_of(settings.worker)
    if settings.texts is None:
        source = StoredCaptions(open_store(settings.data), "train")
        job = CountJob(source, settings, member)
        tokenizer = job.run()
        _keep(tokenizer, job.words(), settings)
        return
    if member.count > 1:
        raise ConfigError("one process reads --texts; start it without other workers")
    captions = islice(_lines(settings.texts), settings.max_captions)
    first = next(captions, None)
    if first is None:
        raise InputError(f"{settings.texts} holds no caption; give a larger one")
    with held(settings.out, "train bpe"):
        words = count_words(chain([first], captions), settings.spaces)
        _keep(learn_merges(words, settings.vocabulary, settings.spaces), words, settings)


def _keep(tokenizer: Tokenizer, words: Mapping[str, int], settings: BPETrain) -> None:
    """Write words.json and tokenizer.json, unless the folder has another tokenizer."""
    entries = tokenizer.get_vocab_size()
    if entries < settings.vocabulary:
        LOG.warning(
            "the captions have merges for %d entries only, not %d", entries, settings.vocabulary
        )
    _keep_others(tokenizer, settings)
    if words:
        save_words(known_words(words), settings.out)
    save_tokenizer(tokenizer, settings.out)
    LOG.info("captions -> %s with %d entries", settings.out, entries)


def _keep_others(tokenizer: Tokenizer, settings: BPETrain) -> None:
    """Raise InputError if the folder has another tokenizer: tokens may be made with it."""
    try:
        kept, _ = load_tokenizer(settings.out)
    except (InputError, CorruptError):
        return
    if kept.to_str() != tokenizer.to_str():
        raise InputError(
            f"{settings.out} holds another tokenizer, of {kept.get_vocab_size()} entries, with "
            "which tokens may have been made; give another --out, or delete it"
        )


def _lines(path: Path) -> Iterator[str]:
    """The captions of a file with one on each line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if is_visible(line.decode("utf-8", "replace")):
                yield clean_caption(line, f"{path}, line {number}")
