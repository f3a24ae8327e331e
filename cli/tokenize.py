"""The verb tokenize."""

from pathlib import Path
from typing import Annotated

from core.flags import FLAT, PositionalText, parse
from data_pipeline.config import TokenizeConfig
from workflow.token_job import tokenize_shards


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
        """Turn raw shards into token shards: image codes and text ids; restartable.

        Args:
            raw: the data set that `tapir pack` wrote
            tokens: s3://bucket/prefix or a folder for the tokens
            dvae: run folder of a finished dVAE, or of an image tokenizer that `tapir import` made
            bpe: folder of tokenizer.json
            worker: this process's part of the job, i/n with i from 0; by default set by a Slurm
                array, a Kubernetes indexed job, MPI or torchrun
            again: check finished shards and write damaged ones again
            config: settings
        """
        tokenize_shards(raw, tokens, dvae, bpe, worker, again, config)

    parse(run, arguments, "tokenize")
