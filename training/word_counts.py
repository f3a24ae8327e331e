"""Counts the words of captions by any number of workers; one of them learns merges from them.

    OUT/counts/<task>.json                 the words of some shards' captions
    OUT/counts/tokenizer-<request>.json    the tokenizer of all captions
    OUT/counts/words-<request>.json        the words that it was learned from
    OUT/counts/_done/, OUT/job.json        those of every job (data_pipeline/jobs/worker.py)

Counts are named by the content of their shards, so that another vocabulary or a larger set counts
only what is new. Sums do not depend on who counted: the tokenizer is that of one process.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tokenizers import Tokenizer

from core.errors import AbsentError, CorruptError
from core.files.atomic import canonical_json, seal, sha256, unseal
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.formats.raw_shards import RawShards
from data_pipeline.jobs.leases import SECONDS
from data_pipeline.jobs.ledger import Record, done_tasks
from data_pipeline.jobs.worker import Job, Progress, Task, Work
from data_pipeline.stored_captions import StoredCaptions
from data_pipeline.text.bpe import count_words, learn_merges
from training.config import BPETrain

COUNTS = "counts/"


@dataclass(frozen=True, kw_only=True, slots=True)
class CountTask(Task):
    """Some consecutive shards of the train split."""

    first: int
    """Number of its first shard."""
    end: int
    """Number of the shard after its last one."""


class CountJob:
    """The counting of one data set's captions, as one worker sees it."""

    def __init__(self, source: StoredCaptions, settings: BPETrain, member: JobWorker) -> None:
        self._source, self._settings = source, settings
        self._store = FolderStore(settings.out)
        self.tasks = tasks_of(source.shards, settings)
        self._job = Job(self._store, self.tasks, member, SECONDS)

    def run(self) -> Tokenizer:
        """Count what no other worker counts; returns the tokenizer when all is counted."""
        result = f"{COUNTS}tokenizer-{self._request()}.json"
        finisher = self._job.finisher(COUNTS, result, lambda: self._learn(result))
        self._job.announce("train bpe", [finisher])
        self._job.run(Work(make=self._count), [finisher])
        return Tokenizer.from_str(self._store.get(result).decode())

    def words(self) -> dict[str, int]:
        """The counts that the tokenizer was learned from; none if an older Tapir learned it."""
        name = self._words_file()
        counts: dict[str, int] = self._read(name)["words"] if self._store.exists(name) else {}
        return counts

    def _request(self) -> str:
        names = [task.name for task in self.tasks]
        sizes = {name: getattr(self._settings, name) for name in ("vocabulary", "max_captions")}
        return sha256(canonical_json({"tasks": names, **sizes}))[:12]

    def _words_file(self) -> str:
        return f"{COUNTS}words-{self._request()}.json"

    def _count(self, task: CountTask, progress: Progress) -> Record:
        captions = 0

        def counted() -> Iterator[str]:
            nonlocal captions
            for captions, caption in enumerate(self._captions(task), 1):
                progress["pairs"] = min(captions, task.size)
                yield caption

        words = count_words(counted(), self._settings.spaces)
        self._store.put(_file(task), seal({"captions": captions, "words": words}), if_absent=True)
        return {"pairs": task.size, "captions": captions}

    def _captions(self, task: CountTask) -> Iterator[str]:
        for shard in range(task.first, task.end):
            yield from self._source.of(shard)

    def _learn(self, result: str) -> bool:
        """Sum the counts of the first `max_captions` captions, and learn merges from them."""
        if not {task.name for task in self.tasks} <= done_tasks(self._store, COUNTS):
            return False
        left, words = self._settings.max_captions, Counter[str]()
        try:
            for task in self.tasks:
                body = self._read(_file(task))
                if body["captions"] > left:  # the last one: its captions are more than are read
                    some = islice(self._captions(task), left)
                    words.update(count_words(some, self._settings.spaces))
                    break
                words.update(body["words"])
                left -= body["captions"]
        except AbsentError:
            return False
        tokenizer = learn_merges(words, self._settings.vocabulary, self._settings.spaces)
        self._store.put(self._words_file(), seal({"words": words}))
        self._store.put(result, tokenizer.to_str(pretty=True).encode())
        return True

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return unseal(self._store.get(name), name)
        except CorruptError as error:
            raise CorruptError(
                f"{self._store.url}/{name} is damaged; delete {self._store.url}/{COUNTS}, and the "
                "same command counts again"
            ) from error


def tasks_of(source: RawShards, settings: BPETrain) -> list[CountTask]:
    """Consecutive shards with at least `task_captions` pairs each, as far as captions are read."""
    tasks, shards, first, size, read = list[CountTask](), source.manifest.shards, 0, 0, 0
    for number, shard in enumerate(shards, 1):
        size += shard.samples
        whole = size >= settings.task_captions or read + size >= settings.max_captions
        if not whole and number < len(shards):
            continue
        content = [source.digest(shard) for shard in range(first, number)]
        name = sha256(canonical_json({"captions": content, "spaces": settings.spaces}))
        shown = f"train/{shards[first].name} and {number - first - 1} more"
        tasks.append(
            CountTask(prefix=COUNTS, name=name, shown=shown, size=size, first=first, end=number)
        )
        first, size, read = number, 0, read + size
        if read >= settings.max_captions:
            break
    return tasks


def _file(task: CountTask) -> str:
    return f"{COUNTS}{task.name}.json"
