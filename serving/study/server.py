"""`tapir study serve`: the server's process, and `tapir study links`."""

import socket
from pathlib import Path

import uvicorn

from core.config import check
from core.log import LOG
from serving.security import Access
from serving.study.app import study_app
from serving.study.config import StudyServer
from serving.study.study import read_study
from serving.study.votes import Votes


def serve_study(folder: Path, config: StudyServer) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises: InputError if there is no study; OSError if the address cannot be used.
    """
    check(config.problems())
    study = read_study(folder)
    votes = Votes(folder, study)
    app = study_app(folder, study, votes, Access(host=config.host, hosts=config.hosts))
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.create_server((config.host, config.port), family=family) as listening:
        host, port = listening.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        LOG.info("study: http://%s, %d raters have links", place, len(votes.raters()))
        if not votes.raters():
            LOG.warning("no links yet: tapir study links %s --raters %d", folder, study.votes)
        server = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False
        )
        try:
            uvicorn.Server(server).run(sockets=[listening])
        finally:
            votes.close()


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
