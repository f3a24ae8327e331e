"""Two servers on one folder, one link on many devices, and a kill while they vote."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.e2e.test_study import COUNT, make
from tests.e2e.test_study_page import stored
from tests.harness import json_of
from tests.support.raters import Rater, Server

pytestmark = pytest.mark.slow
DEVICES, KILL_AFTER = 4, 30
QUESTIONS = ("realism", "match")


def rate(devices: list[Rater], killed: threading.Event, counted: list[int]) -> list[int]:
    """One rater on two servers: each answer is sent to both at once; returns the statuses.

    What a dead server does not answer is answered by the other one.
    """
    statuses: list[int] = []
    with ThreadPoolExecutor(len(devices)) as pool:

        def all_of(name: str, *arguments: object) -> list[object]:
            tasks = [pool.submit(getattr(device, name), *arguments) for device in devices]
            answers: list[object] = []
            for task in tasks:
                try:
                    answers.append(task.result())
                except (OSError, HTTPException):
                    assert killed.is_set(), "a living server answers"
            return answers

        while len(trials := set(all_of("trial"))) == 1 and (trial := trials.pop()) is not None:
            codes = [int(str(code)) for code in all_of("answer", trial, "left", "right")]
            assert codes.count(303) <= 1 and set(codes) <= {303, 409}, codes
            statuses += codes
            counted.append(len(codes))
        assert not trials, "both servers show a rater the same pictures"
    return statuses


def test_two_servers_share_a_study_and_one_is_killed(tmp_path: Path) -> None:
    study = make(tmp_path, "--votes=2", "--catch-every=0")
    links = json_of("study", "links", str(study), f"--raters={DEVICES}")
    servers = [Server(study, tmp_path / f"log{i}") for i in (0, 1)]
    for server in servers:
        server.start()
    killed, counted = threading.Event(), list[int]()
    with ThreadPoolExecutor(DEVICES) as pool:
        running = [
            pool.submit(rate, [Rater(server, links[n]) for server in servers], killed, counted)
            for n in links
        ]
        while len(counted) < KILL_AFTER and not all(task.done() for task in running):
            threading.Event().wait(0.01)
        killed.set()
        servers[1].kill()
        statuses = [status for task in running for status in task.result()]
    votes = stored(study)
    assert Counter((vote.trial, vote.question) for vote in votes) == {
        (trial, question): 2 for trial in range(COUNT) for question in QUESTIONS
    }
    assert {vote.seat for vote in votes if vote.question == "match"} == {"right"}
    confirmed = statuses.count(303)
    assert 2 * COUNT - DEVICES <= confirmed <= 2 * COUNT, "at most one answer a rater unconfirmed"
    servers[1].start()
    assert Rater(servers[1], links["1"]).trial() is None
