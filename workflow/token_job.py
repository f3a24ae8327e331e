"""One worker of the token job: image tokenizer and BPE turn raw shards into token shards."""

from pathlib import Path

from core.config import check
from core.files.out_folder import refuse_others_folder
from core.log import LOG
from core.memory import keep_freed_memory
from core.storage.store import open_store
from core.workers import job_worker_of
from data_pipeline.config import TokenizeConfig
from data_pipeline.text.bpe import load_tokenizer
from data_pipeline.tokenize.encode import Encoders
from data_pipeline.tokenize.worker import Worker
from parallel.device import worker_device
from parallel.precision import set_numerics
from training.export.tokenizers import describe_tokenizer, open_tokenizer


def tokenize_shards(
    raw: str, tokens: str, dvae: Path, bpe: Path, worker: str, again: bool, config: TokenizeConfig
) -> int:
    """Make the shards that no other worker makes; returns how many.

    Raises: ConfigError with every problem of the settings; InputError for a dVAE that still
    trains, or a TOKENS that holds something else.
    """
    check(config.problems())
    refuse_others_folder(tokens, "a data set")
    member = job_worker_of(worker)
    tokenizer, tokenizer_hash = load_tokenizer(bpe)
    describe_tokenizer(dvae)  # tokens of a dVAE that still trains would fit no prior
    device = worker_device(member.number)
    if device.type == "cpu":
        keep_freed_memory()
    encoders = Encoders(
        numerics=set_numerics(device, precision=config.precision),
        images=open_tokenizer(dvae, device, config.precision),
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash,
    )
    made = Worker(open_store(raw), open_store(tokens), encoders, config, member).run(again)
    LOG.info("worker %s made %d shards", member.text, made)
    return made
