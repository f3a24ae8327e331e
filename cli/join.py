"""The verb data join."""

from typing import Annotated

import tyro

from core.errors import InputError
from core.files.out_folder import refuse_others_folder
from core.flags import parse, print_json
from core.log import LOG
from core.storage.store import open_store
from data_pipeline.packing.join import join as join_sets


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
