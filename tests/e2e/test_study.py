"""A study through HTTP: three raters, twenty captions, and a server that is killed meanwhile."""

import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPException
from pathlib import Path
from threading import Condition
from typing import TypeVar

import pytest

from serving.study.statistics import wilson
from serving.study.study import read_study
from serving.study.votes import Votes
from tests.harness import PATIENCE, json_of, tapir
from tests.support.raters import (
    BLUE,
    RED,
    Rater,
    Server,
    captions_of,
    intact,
    is_catch,
    seat_of,
    write_set,
)

pytestmark = pytest.mark.seconds
COUNT = 20
T = TypeVar("T")
Answers = dict[int, tuple[str, str]]
"""Trial -> the answers that the server has confirmed."""


class Board:
    """Counts confirmed answers; raters wait here while the server is down."""

    def __init__(self) -> None:
        self.changed, self.count, self.up = Condition(), 0, True

    def confirm(self) -> None:
        with self.changed:
            self.count += 1
            self.changed.notify_all()

    def set_up(self, up: bool) -> None:
        with self.changed:
            self.up = up
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)


def make(folder: Path, *flags: str) -> Path:
    """A study of COUNT captions, red pictures against blue ones."""
    a = write_set(folder / "a", captions_of(COUNT), RED)
    b = write_set(folder / "b", captions_of(COUNT), BLUE)
    tapir("study", "make", str(a), str(b), f"--out={folder / 'study'}", *flags)
    return folder / "study"


def rate(rater: Rater, colour: tuple[int, int, int], board: Board) -> Answers:
    """Answer all trials: the picture in this colour is more realistic, and red matches better.

    As the page does, an answer that was not confirmed is sent again.
    """
    confirmed: Answers = {}
    while (trial := until_answered(board, rater.trial)) is not None:
        left, right = until_answered(board, partial(rater.look, trial))
        catch = is_catch(left, right)
        realism = intact(left, right) if catch else seat_of(colour, left)
        match = intact(left, right) if catch else seat_of(RED, left)
        answer = partial(rater.answer, trial, realism, match)
        assert until_answered(board, answer) in (303, 409), "counted now, or before the kill"
        confirmed[trial] = realism, match
        board.confirm()
    return confirmed


def until_answered(board: Board, ask: Callable[[], T]) -> T:
    """Ask again while the server is down."""
    while True:
        try:
            return ask()
        except (OSError, HTTPException):  # refused, reset, or ended in the middle
            board.wait(lambda: board.up)


def test_a_killed_server_loses_no_vote(tmp_path: Path) -> None:
    study = make(tmp_path, "--votes=3")
    links = json_of("study", "links", str(study), "--raters=3")
    server, board = Server(study, tmp_path / "log"), Board()
    server.start()
    raters = [Rater(server, links[str(number)]) for number in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        running = [
            pool.submit(rate, rater, colour, board)
            for rater, colour in zip(raters, (RED, RED, BLUE), strict=True)
        ]
        for count in (10, 40):
            board.wait(lambda count=count: board.count >= count)  # type: ignore[misc]
            board.set_up(False)
            server.kill()
            server.start()
            board.set_up(True)
        confirmed = [task.result(PATIENCE) for task in running]
    with closing(sqlite3.connect(study / "votes.db")) as database:
        stored = database.execute("SELECT rater, trial, question, seat FROM vote").fetchall()
    kept = {(rater, trial, question): seat for rater, trial, question, seat in stored}
    assert len(stored) == len(kept) == 3 * (COUNT + 2) * 2
    for number, answers in enumerate(confirmed, 1):
        assert len(answers) == COUNT + 2
        for trial, (realism, match) in answers.items():
            assert kept[number, trial, "realism"] == realism
            assert kept[number, trial, "match"] == match
    check_figures(json_of("study", "results", str(study)))


def check_figures(body: dict) -> None:  # type: ignore[type-arg]
    """Two of three raters pick red as more realistic, and all as the better match."""
    realism, match = body["questions"]["realism"], body["questions"]["match"]
    assert [row["catch_right"] for row in body["raters"]] == [4, 4, 4]
    assert all(row["kept"] and row["captions"] == COUNT for row in body["raters"])
    low, high = wilson(COUNT, COUNT) or (0, 0)
    a = {"captions": 20, "share": 1.0, "low": low, "high": high}
    assert realism["majority"]["a"] == match["majority"]["a"] == a
    assert low == pytest.approx(20 / (20 + 1.959963984540054**2))
    assert realism["votes"]["a"]["share"] == pytest.approx(2 / 3)
    assert realism["votes"]["a"]["votes"] == 40 and realism["votes"]["b"]["votes"] == 20
    assert realism["agreement"]["agreeing_pairs"] == pytest.approx(1 / 3)
    # 60 votes, 40 to 20: observed disagreement 2/3, expected 2 * 40 * 20 / (60 * 59)
    assert realism["agreement"]["alpha"] == pytest.approx(1 - (2 / 3) / (1600 / 3540))
    assert match["agreement"] == {"alpha": None, "low": None, "high": None, "agreeing_pairs": 1.0}


def test_answers_that_do_not_count_are_refused(tmp_path: Path) -> None:
    study = make(tmp_path, "--votes=1", "--catch-every=0")
    links = json_of("study", "links", str(study), "--raters=2")
    server = Server(study, tmp_path / "log")
    server.start()
    first, second = (Rater(server, links[number]) for number in "12")
    trial, other = first.trial(), second.trial()
    assert trial is not None and other is not None and trial != other, "one vote a caption: held"
    assert first.trial() == trial, "the open trial again"
    for realism, match in (("neither", "left"), ("left", ""), ("a", "left"), ("", "")):
        assert first.answer(trial, realism, match) == 422
    assert first.answer(other, "left", "left") == 409, "shown to another rater alone"
    assert first.answer(trial, "left", "neither") == 303
    assert first.answer(trial, "right", "right") == 409, "a double vote"
    votes = Votes(study, read_study(study))
    assert [(v.rater, v.trial, v.seat) for v in votes.all()] == [
        (1, trial, "neither"),
        (1, trial, "left"),
    ]
    votes.close()
    assert first.request("GET", f"{first.path}/{other}/left.png")[0] == 404
    assert first.request("GET", f"{first.path}/{trial}/middle.png")[0] == 422
    assert first.request("GET", f"{first.path}/{trial}/..%2f..%2fvotes.db")[0] == 404
    assert first.request("GET", f"{first.path}/{10**30}/left.png")[0] == 422
    assert first.request("GET", "/r/unknown")[0] == 404
    assert first.request("POST", "/r/unknown/0", "realism=left&match=left")[0] == 404
    assert first.request("POST", f"{first.path}/{trial}", "x" * 5000)[0] == 413
    assert first.request("GET", first.path, Host="evil.example")[0] == 421
    body = "realism=left&match=left"
    for origin in ("http://evil.example", "null"):
        assert first.request("POST", f"{first.path}/1", body, Origin=origin)[0] == 403
    assert server.stop() == 0, "SIGTERM ends it cleanly"
    server.start()
    renewed = json_of("study", "links", str(study), "--replace=2")
    assert second.request("GET", second.path)[0] == 404, "the old link ends"
    assert Rater(server, renewed["2"]).trial() == other


def test_what_raters_get_names_no_set(tmp_path: Path) -> None:
    study = make(tmp_path, "--votes=1", "--catch-every=0")
    links = json_of("study", "links", str(study), "--raters=1")
    server = Server(study, tmp_path / "log")
    server.start()
    rater = Rater(server, links["1"])
    trial = rater.trial()
    _, page = rater.request("GET", rater.path)
    for name in (str(tmp_path), "/a/", "/b/", "-a.png", "-b.png"):
        assert name not in page.decode(), name
    sizes = []
    for seat in ("left", "right"):
        _, data = rater.request("GET", f"{rater.path}/{trial}/{seat}.png")
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and b"tEXt" not in data
        sizes.append(data[16:24])
    assert sizes[0] == sizes[1] == bytes([0, 0, 0, 12, 0, 0, 0, 12]), "width and height"
    token = rater.path.removeprefix("/r/")
    stored = b"".join(path.read_bytes() for path in study.glob("*") if path.is_file())
    assert token.encode() not in stored + (tmp_path / "log").read_bytes()
    assert b"127.0.0.1" not in stored, "no addresses of raters"
    settings = json.loads((study / "study.json").read_text())
    assert (Path(settings["a"]).name, Path(settings["b"]).name) == ("a", "b")
