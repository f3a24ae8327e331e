"""`tapir study serve`: the server's process, and `tapir study links`."""

from pathlib import Path

import uvicorn

from core.config import check
from core.log import LOG
from serving.listening import StoppableServer, address_of, listening
from serving.security import Access
from serving.study.app import study_app
from serving.study.config import StudyServer
from serving.study.study import read_study
from serving.study.votes import Votes

_CONNECTIONS = 512
"""Open connections; further ones are answered 503, after which the page tries again."""


def serve_study(folder: Path, config: StudyServer) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises: ConfigError for an address that cannot be taken; InputError if there is no study.
    """
    check(config.problems())
    study = read_study(folder)
    votes = Votes(folder, study)
    server = uvicorn.Config(
        study_app(folder, study, votes, Access(host=config.host, hosts=config.hosts)),
        log_config=None,
        access_log=False,  # addresses of raters, and their links
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
    )
    try:
        with listening(config.host, config.port) as listener:
            raters, place = len(votes.raters()), address_of(config.host, listener)
            LOG.info("study: %s, %d raters have links", place, raters)
            if not raters:
                LOG.warning("no links yet: tapir study links %s --raters %d", folder, study.votes)
            StoppableServer(server).run(sockets=[listener])
    finally:
        votes.close()
    LOG.info("stopped; the same command goes on")


def make_links(folder: Path, raters: int, replace: int, url: str) -> dict[int, str]:
    """Add raters, or give one a new link; returns rater -> link. Links cannot be shown again.

    Raises: InputError if there is no study, or no such rater; ConfigError for wrong settings.
    """
    problems = []
    if (raters > 0) == (replace > 0) or min(raters, replace) < 0:
        problems.append("give --raters N for N new links, or --replace RATER for another one")
    if not url.startswith(("http://", "https://")):
        problems.append(f"url={url!r} must begin with http:// or https://")
    check(problems)
    votes = Votes(folder, read_study(folder))
    try:
        rows = [(replace, votes.replace_token(replace))] if replace else votes.add_raters(raters)
    finally:
        votes.close()
    return {number: f"{url.rstrip('/')}/r/{token}" for number, token in rows}
