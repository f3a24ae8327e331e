"""Trains the tokenizer, the only stage without the training loop."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from tokenizers import Tokenizer

from core.config import check
from core.errors import ConfigError, CorruptError, InputError
from core.files.atomic import held
from core.files.out_folder import refuse_others_folder
from core.launch_environment import ranks_given
from core.log import LOG
from core.storage.store import open_store
from data_pipeline.formats.raw import RawSource
from data_pipeline.streaming.stream import stored_records
from data_pipeline.text.bpe import load_tokenizer, save_tokenizer, train_bpe
from data_pipeline.text.captions import clean_caption, is_visible
from training.config import BPETrain


def train_tokenizer(settings: BPETrain) -> None:
    """Learn merges from captions and write tokenizer.json.

    Raises: InputError if there is no caption, or if the folder has another tokenizer.
    """
    check(settings.problems())
    if (ranks_given() or 1) > 1:
        raise ConfigError("train bpe is one process; start it without mpirun or torchrun")
    refuse_others_folder(settings.out, "train bpe")
    captions = islice(_captions(settings), settings.max_captions)
    first = next(captions, None)
    if first is None:
        raise InputError(f"{settings.texts or settings.data} holds no caption; give a larger one")
    with held(settings.out, "train bpe"):
        _learn(settings, chain([first], captions))


def _learn(settings: BPETrain, captions: Iterable[str]) -> None:
    tokenizer = train_bpe(captions, settings.vocabulary, settings.spaces)
    entries = tokenizer.get_vocab_size()
    if entries < settings.vocabulary:
        LOG.warning(
            "the captions have merges for %d entries only, not %d", entries, settings.vocabulary
        )
    _keep_others(tokenizer, settings)
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


def _captions(settings: BPETrain) -> Iterator[str]:
    if settings.texts is None:
        source = RawSource(open_store(settings.data), "train")
        yield from (text for record in stored_records(source) for text in record.captions)
        return
    with open(settings.texts, "rb") as file:
        for number, line in enumerate(file, 1):
            if is_visible(line.decode("utf-8", "replace")):
                yield clean_caption(line, f"{settings.texts}, line {number}")
