"""Entry points of the training stages: decide who the ranks are, then run the loop."""

import importlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

from cluster.supervisor import supervise
from core.errors import ConfigError, InputError
from core.log import LOG
from core.settings import check, from_json, to_json
from core.stop import heed_stop_signals
from core.store import open_store
from data_pipeline.bpe import save_tokenizer, train_bpe
from data_pipeline.captions import clean_caption
from data_pipeline.raw import RawSource
from data_pipeline.stream import stored_records
from parallel.engines.catalogue import modules_of
from parallel.world import srun_size
from training.config import BPETrain, ClipTrain, DVAETrain, PriorTrain, StageConfig

SETTINGS: dict[str, type[StageConfig]] = {
    "dvae": DVAETrain,
    "prior": PriorTrain,
    "clip": ClipTrain,
}
PRELOAD = ["torch", "torch.distributed", "training.rank"]


def train_stage(stage: str, settings: StageConfig) -> None:
    """Train a stage: join the ranks that are there, or spawn the mesh's own.

    Raises: ConfigError with every problem of the settings; RankError if a rank dies.
    """
    started = ranks_given()
    check(settings.problems(started))
    heed_stop_signals()
    payload = json.dumps({"stage": stage, "settings": to_json(settings)})
    if started is None and settings.mesh.world > 1:
        model_parallel = settings.mesh.world > settings.mesh.data
        preload = [*PRELOAD, *modules_of(settings.engine.name, model_parallel)]
        supervisor, reports = settings.supervisor, settings.out / "hang"
        supervise("training.rank:run", payload, settings.mesh.world, preload, supervisor, reports)
        return
    importlib.import_module("training.rank").run(payload)


def ranks_given() -> int | None:
    """How many ranks torchrun, mpirun, srun or our launcher started; None if nobody did."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            text = os.environ[name]
            if not (text.isdigit() and int(text) > 0):
                raise InputError(f"{name}={text!r} in the environment is no number of ranks")
            return int(text)
    return srun_size() or None


def parse_payload(payload: str) -> tuple[str, Any]:
    """The stage and its settings, as a rank receives them."""
    body = json.loads(payload)
    return body["stage"], from_json(SETTINGS[body["stage"]], body["settings"])


def train_tokenizer(settings: BPETrain) -> None:
    """Learn merges from captions and write tokenizer.json."""
    check(settings.problems())
    if (ranks_given() or 1) > 1:
        raise ConfigError("train bpe is one process; start it without mpirun or torchrun")
    captions = islice(_captions(settings), settings.most_captions)
    tokenizer = train_bpe(captions, settings.vocabulary)
    entries = tokenizer.get_vocab_size()
    if entries < settings.vocabulary:
        LOG.warning(
            "the captions have merges for %d entries only, not %d", entries, settings.vocabulary
        )
    save_tokenizer(tokenizer, settings.out)
    LOG.info("captions -> %s with %d entries", settings.out, entries)


def _captions(settings: BPETrain) -> Iterator[str]:
    if settings.texts is None:
        source = RawSource(open_store(settings.data), "train")
        yield from (record.caption for record in stored_records(source))
        return
    with open(settings.texts, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield clean_caption(line, f"{settings.texts}, line {number}")
