"""The verb tokenize."""

from pathlib import Path
from typing import Annotated

from core.config import check
from core.files.out_folder import refuse_others_folder
from core.flags import FLAT, PositionalText, parse
from core.log import LOG
from core.memory import keep_freed_memory
from core.storage.store import open_store
from core.workers import job_worker_of
from data_pipeline.config import TokenizeConfig
from data_pipeline.text.bpe import load_tokenizer
from data_pipeline.tokenize.encode import Encoders
from data_pipeline.tokenize.worker import Worker
from models.code_encoder import CodeReader
from parallel.device import worker_device
from parallel.precision import set_numerics
from training.export.weights import describe, load_dvae


def tokenize(arguments: list[str]) -> None:
    """`tapir tokenize RAW TOKENS`."""

    def run(
        raw: PositionalText,
        tokens: PositionalText,
        dvae: Path = Path("runs/dvae"),
        bpe: Path = Path("runs/bpe"),
        worker: str = "",
        again: bool = False,
        config: Annotated[TokenizeConfig, FLAT] = TokenizeConfig(),  # noqa: B008
    ) -> None:
        """Turn raw shards into token shards: dVAE codes and text ids; restartable.

        Args:
            raw: where `tapir pack` wrote
            tokens: s3://bucket/prefix or a folder for the tokens
            dvae: run folder of a finished dVAE
            bpe: folder of tokenizer.json
            worker: which part of the job this process begins with, i/n with i from 0; by default
                what a Slurm array, a Kubernetes indexed job, MPI or torchrun says
            again: check finished shards and make damaged ones anew
            config: settings
        """
        check(config.problems())
        refuse_others_folder(tokens, "a data set")
        member = job_worker_of(worker)
        tokenizer, tokenizer_hash = load_tokenizer(bpe)
        describe(dvae, "dvae")  # tokens of a dVAE that still trains would fit no prior
        model, model_hash = load_dvae(dvae)
        device = worker_device(member.number)
        if device.type == "cpu":
            keep_freed_memory()
        encoders = Encoders(
            numerics=set_numerics(device, precision=config.precision),
            codes=CodeReader(model.to(device), config.precision),
            dvae_hash=model_hash,
            tokenizer=tokenizer,
            tokenizer_hash=tokenizer_hash,
        )
        job = Worker(open_store(raw), open_store(tokens), encoders, config, member)
        LOG.info("worker %s made %d shards", member.text, job.run(again))

    parse(run, arguments, "tokenize")
