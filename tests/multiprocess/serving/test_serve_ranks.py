"""Tensor and pipeline ranks behind one server, and what happens when one is killed."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.multiprocess.serving.served import CAPTIONS, Served, served
from tests.multiprocess.serving.test_images_api import GENERATE, pictures, request

pytestmark = [pytest.mark.world, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("ranks")
    with served(folder, "--rows=4", "--tensor=2", "--pipeline=2") as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as each:
        yield each


def ranks_of(server: Served) -> list[psutil.Process]:
    """The processes that the server's forkserver has started, in the order of their ranks."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    return sorted(
        (x for x in below if x.parent() != psutil.Process(server.process.pid)),
        key=lambda x: x.create_time(),
    )


def compare_with_one_process(server: Served, client: httpx.Client, folder: Path) -> None:
    """Plain and guided requests at once draw the pictures of `tapir sample`."""
    plain = server.sampled(folder / "a", CAPTIONS[0], 3, "--seed=5")
    guided = server.sampled(folder / "b", CAPTIONS[1], 1, "--seed=6", "--guidance=2")
    answers: dict[int, httpx.Response] = {}

    def ask(i: int) -> None:
        more = {"n": 1, "seed": 6, "guidance": 2} if i % 2 else {"n": 3, "seed": 5}
        answers[i] = client.post(GENERATE, json=request(CAPTIONS[i % 2], **more))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answer in sorted(answers.items()):
        assert pictures(answer) == (guided if i % 2 else plain), i


def test_four_ranks_draw_what_one_process_draws(
    server: Served, client: httpx.Client, tmp_path: Path
) -> None:
    compare_with_one_process(server, client, tmp_path)


@pytest.mark.parametrize("flag", ["--tensor=2", "--pipeline=2"])
def test_two_ranks_draw_what_one_process_draws(flag: str, tmp_path: Path) -> None:
    with served(tmp_path, "--rows=4", flag) as two, two.client() as client:
        assert len(ranks_of(two)) == 2
        compare_with_one_process(two, client, tmp_path)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_is_answered_by_503_and_a_restart(
    server: Served,
    client: httpx.Client,
    rank: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server.until_ready()
    before = server.metric("tapir_restarts_total")
    ranks = ranks_of(server)
    assert len(ranks) == 4
    asked = request(CAPTIONS[0], n=16, stream=True, partial_images=3)
    with client.stream("POST", GENERATE, json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(ranks[rank].pid, signal.SIGKILL)
        events = [line for line in lines if line.startswith("event: ")]
    assert events[-1] == "event: error"
    refused = client.post(GENERATE, json=request(CAPTIONS[0]))
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert client.get("/healthz").status_code == 503
    server.until_ready()
    assert server.metric("tapir_restarts_total") == before + 1
    expected = server.sampled(tmp_path_factory.mktemp("again"), CAPTIONS[0], 2, "--seed=7")
    assert pictures(client.post(GENERATE, json=request(CAPTIONS[0], n=2, seed=7))) == expected
