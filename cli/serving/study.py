"""The verb study."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from core.errors import InputError, did_you_mean
from core.flags import FLAT, PositionalPath, PositionalText, parse, print_json
from core.log import LOG
from serving.study.config import StudyConfig, StudyServer


def study(arguments: list[str]) -> None:
    """`tapir study make | links | serve | results`."""
    name, rest = (arguments or [""])[0], arguments[1:]
    if name in ("-h", "--help"):
        sys.stdout.write(_HELP)
    elif name in PARTS:
        PARTS[name](rest)
    else:
        hint = did_you_mean(name, PARTS)
        raise InputError(f"tapir study {name}: give one of {', '.join(PARTS)}{hint}")


def make(arguments: list[str]) -> None:
    """`tapir study make A B --out DIR`."""

    def run(
        a: PositionalText,
        b: PositionalText,
        out: Path = Path("runs/study"),
        config: Annotated[StudyConfig, FLAT] = StudyConfig(),  # noqa: B008
    ) -> None:
        """Prepare a blind comparison of two sets of pictures of the same captions.

        A set is a run (a folder with prior, dvae, bpe and clip), which draws, or pictures with
        captions: what `tapir pack` wrote (its validation split) or reads.

        Args:
            a: the first set
            b: the second set
            out: new folder of the study
            config: settings
        """
        from serving.study.make import make_study  # noqa: PLC0415 - keeps --help fast

        made = make_study(a, b, out, config)
        LOG.info(
            "study: %s, %d captions, %d catch trials; next: tapir study links %s --raters %d",
            *(out, len(made.captions), len(made.catches), out, made.votes),
        )

    parse(run, arguments, "study make")


def links(arguments: list[str]) -> None:
    """`tapir study links DIR --raters N`."""

    def run(
        folder: PositionalPath,
        raters: int = 0,
        replace: int = 0,
        url: str = "http://127.0.0.1:8001",
        json: bool = False,
    ) -> None:
        """Print a new link for each rater: the only time that it can be read.

        Args:
            folder: the study
            raters: how many raters to add
            replace: number of a rater who gets another link instead; the votes stay, the old link
                ends
            url: address under which raters reach `tapir study serve`
            json: print a JSON object on the last line
        """
        from serving.study.server import make_links  # noqa: PLC0415

        made = make_links(folder, raters, replace, url)
        if json:
            print_json({str(rater): link for rater, link in made.items()})
            return
        sys.stdout.write("".join(f"{rater}\t{link}\n" for rater, link in made.items()))

    parse(run, arguments, "study links")


def serve(arguments: list[str]) -> None:
    """`tapir study serve DIR`."""

    def run(
        folder: PositionalPath,
        config: Annotated[StudyServer, FLAT] = StudyServer(),  # noqa: B008
    ) -> None:
        """Serve the raters' pages until Ctrl-C; start it again at any time, no vote is lost.

        Args:
            folder: the study
            config: settings
        """
        from serving.study.server import serve_study  # noqa: PLC0415

        serve_study(folder, config)

    parse(run, arguments, "study serve")


def results(arguments: list[str]) -> None:
    """`tapir study results DIR`."""

    def run(folder: PositionalPath, without: tuple[int, ...] = (), json: bool = False) -> None:
        """Write results.json and results.html of a study, also while it runs.

        Args:
            folder: the study
            without: numbers of raters whose votes are left out
            json: print a JSON object on the last line
        """
        from serving.study.report import PAGE, findings, write_results  # noqa: PLC0415

        body = write_results(folder, without)
        for line in findings(body):
            LOG.info("%s", line)
        LOG.info("page: %s", folder / PAGE)
        if json:
            print_json(body)

    parse(run, arguments, "study results")


PARTS: dict[str, Callable[[list[str]], None]] = {
    "make": make,
    "links": links,
    "serve": serve,
    "results": results,
}
_HELP = """usage: tapir study make A B --out DIR     two sets of pictures of the same captions
       tapir study links DIR --raters N   a link for each rater
       tapir study serve DIR              the raters' pages
       tapir study results DIR            shares, agreement and intervals, as JSON and a page

People compare pictures blind: which is more realistic, and which matches the caption better?
`tapir study make --help` and so on have the flags.
"""
