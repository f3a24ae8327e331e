"""The verbs pack and data join."""

from typing import Annotated

import tyro

from core.errors import InputError
from core.files.out_folder import refuse_others_folder
from core.flags import FLAT, PositionalTexts, parse, print_json
from core.log import LOG
from core.storage.store import open_store
from core.workers import job_worker_of
from data_pipeline.config import PackConfig
from data_pipeline.packing import pack as packing
from data_pipeline.packing.join import join as join_sets
from data_pipeline.packing.rejects import REJECTS


def pack(arguments: list[str]) -> None:
    """`tapir pack SRC ... DEST`."""

    def run(
        places: PositionalTexts,
        config: Annotated[PackConfig, FLAT] = PackConfig(),  # noqa: B008
        worker: str = "",
        append: bool = False,
        again: bool = False,
        json: bool = False,
    ) -> None:
        """Write raw image-caption pairs as WebDataset shards, split into train and validation.

        Args:
            places: one or several SRC, and DEST, which is s3://bucket/prefix or a folder. A SRC is
                shapes, panels, emoji, a folder of images with .txt or .json captions, a WebDataset
                tar, a .parquet table of captions and pictures or their paths, a folder of tars or
                tables, an s3://bucket/prefix of the same, or a pattern such as
                's3://b/{0000..0099}.tar'
            config: settings
            worker: this process's part of the job, i/n with i from 0; by default set by a Slurm
                array, a Kubernetes indexed job, MPI or torchrun
            append: add what SRC holds and a finished DEST does not, as its next version, with the
                settings that it was packed with
            again: verify a finished data set's shards, and write damaged ones again
            json: print a JSON object on the last line
        """
        if len(places) < 2:
            raise InputError("pack needs at least one SRC and a DEST, e.g. tapir pack shapes DEST")
        *sources, dest = places
        refuse_others_folder(dest, "a data set")
        member = job_worker_of(worker)
        manifests = packing.pack(sources, open_store(dest), config, again, member, append)
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
            raise InputError("give two sets or more and --dest: tapir data join A B --dest C")
        refuse_others_folder(dest, "a data set")
        joined = join_sets([open_store(place) for place in sets], open_store(dest))
        for split, manifest in joined.items():
            LOG.info("%s: %d pairs in %d shards", split, manifest.samples, len(manifest.shards))
        if json:
            print_json({split: manifest.samples for split, manifest in joined.items()})

    parse(run, arguments, "data join")
