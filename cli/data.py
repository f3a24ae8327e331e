"""The verbs pack and data join."""

from typing import Annotated

import tyro

from core.errors import InputError
from core.files.out_folder import refuse_others_folder
from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from core.storage.store import open_store
from data_pipeline.config import PackConfig
from data_pipeline.packing import pack as packing
from data_pipeline.packing.join import join as join_sets
from data_pipeline.packing.rejects import REJECTS


def pack(arguments: list[str]) -> None:
    """`tapir pack SRC DEST`."""

    def run(
        source: PositionalText,
        dest: PositionalText,
        config: Annotated[PackConfig, FLAT] = PackConfig(),  # noqa: B008
        again: bool = False,
        json: bool = False,
    ) -> None:
        """Write raw image-caption pairs as WebDataset shards, split into train and validation.

        Args:
            source: shapes, emoji, a folder of images with .txt or .json captions, a WebDataset
                tar, a .parquet table of captions and pictures or local paths, or a folder of tars
                or tables
            dest: s3://bucket/prefix or a folder
            config: settings
            again: write a finished data set again, which repairs damaged shards
            json: print a JSON object on the last line
        """
        refuse_others_folder(dest, "a data set")
        manifests = packing.pack(source, open_store(dest), config, again)
        for split, manifest in manifests.items():
            LOG.info("%s: %d pairs in %d shards", split, manifest.samples, len(manifest.shards))
        rejects = manifests["train"].rejects
        if rejects:
            rows = ", ".join(f"{count} {kind}" for kind, count in sorted(rejects.items()))
            LOG.info("left out: %s; each with its reason in %s/%s", rows, dest, REJECTS)
        if json:
            counts = {split: manifest.samples for split, manifest in manifests.items()}
            print_json({**counts, "rejects": rejects})

    parse(run, arguments, "pack")


def join(arguments: list[str]) -> None:
    """`tapir data join A B --dest C`."""

    def run(
        sets: Annotated[tuple[str, ...], tyro.conf.Positional],
        dest: str = "",
        json: bool = False,
    ) -> None:
        """Write one raw set over the shards of several, without copying a picture.

        The sets must stay where they are. Refused if two pairs have one key.

        Args:
            sets: two or more data sets that `tapir pack` wrote
            dest: s3://bucket/prefix or a folder
            json: print a JSON object on the last line
        """
        if len(sets) < 2 or not dest:
            raise InputError("give two sets or more, and where theirs goes: A B --dest C")
        refuse_others_folder(dest, "a data set")
        joined = join_sets([open_store(place) for place in sets], open_store(dest))
        for split, manifest in joined.items():
            LOG.info("%s: %d pairs in %d shards", split, manifest.samples, len(manifest.shards))
        if json:
            print_json({split: manifest.samples for split, manifest in joined.items()})

    parse(run, arguments, "data join")
