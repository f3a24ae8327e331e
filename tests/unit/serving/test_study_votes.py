"""Who sees which pictures, in which order and on which side, and which votes count."""

import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import CorruptError, InputError
from core.files.atomic import sha256
from serving.study import votes as module
from serving.study.results import study_results
from serving.study.study import DATABASE, FILE, Study, read_study
from serving.study.votes import DoubleVoteError, NotShownError, Votes, create_votes

BOTH = {"realism": "left", "match": "neither"}


def study_of(captions: int, **changes: object) -> Study:
    settings = {
        "a": "one",
        "b": "two",
        "captions": tuple(f"caption {i}" for i in range(captions)),
        "catches": (),
        "votes": 5,
        "per_rater": 0,
        "catch_every": 0,
        "catch_least": 0.75,
        "seed": 7,
        "drawn": {},
    }
    return Study(**{**settings, **changes})  # type: ignore[arg-type]


def opened(folder: Path, study: Study, raters: int) -> Votes:
    create_votes(folder, study)
    votes = Votes(folder, study)
    assert [number for number, _ in votes.add_raters(raters)] == list(range(1, raters + 1))
    return votes


def rate_all(votes: Votes, rater: int, wrong: bool = False) -> list[int]:
    """Answer until nothing is left, catch trials right or wrong; returns the trials in order."""
    trials = []
    while (trial := votes.next_trial(rater)) is not None:
        votes.add(rater, trial, answer_of(votes._study, rater, trial, wrong))
        trials.append(trial)
    return trials


def answer_of(study: Study, rater: int, trial: int, wrong: bool = False) -> dict[str, str]:
    """Left for all captions; the intact picture of a catch trial, or the broken one."""
    intact_is_left = study.left(trial, rater) == "a"
    seat = "left" if not study.is_catch(trial) or intact_is_left != wrong else "right"
    return {"realism": seat, "match": seat}


def test_sides_are_drawn_by_key() -> None:
    study = study_of(1000)
    left = [[study.left(trial, rater) for trial in range(1000)] for rater in (1, 2)]
    assert left[0] == [study.left(trial, 1) for trial in range(1000)]
    assert all(450 <= row.count("a") <= 550 for row in left)
    equal = sum(first == second for first, second in zip(*left, strict=True))
    assert 450 <= equal <= 550, "raters' sides are independent"
    other = replace(study, seed=8)
    assert left[0] != [other.left(trial, 1) for trial in range(1000)]


def test_a_vote_is_for_the_set_on_its_side(tmp_path: Path) -> None:
    study = study_of(40)
    votes = opened(tmp_path, study, 1)
    for _ in range(40):
        trial = votes.next_trial(1)
        assert trial is not None
        votes.add(1, trial, {"realism": "left", "match": "right"})
    for vote in votes.all():
        left = study.left(vote.trial, 1)
        right = {"a": "b", "b": "a"}[left]
        assert vote.picked == {"left": left, "right": right}[vote.seat]
    assert {v.picked for v in votes.all() if v.question == "realism"} == {"a", "b"}
    votes.close()


def test_each_rater_has_an_order_and_catch_trials_of_its_own(tmp_path: Path) -> None:
    study = study_of(25, catches=("x", "y", "z"), catch_every=10)
    votes = opened(tmp_path, study, 5)
    orders = [rate_all(votes, rater) for rater in range(1, 6)]
    for order in orders:
        assert sorted(order) == list(range(28))
        places = [order.index(trial) for trial in (25, 26, 27)]
        blocks = [(place - i) // 10 for i, place in enumerate(places)]
        assert blocks == [0, 1, 2], "one among each ten captions, and among the last five"
    assert len({tuple(order) for order in orders}) == 5
    assert len({order.index(25) for order in orders}) > 1
    votes.close()


def test_a_caption_gets_its_votes_and_not_more(tmp_path: Path) -> None:
    votes = opened(tmp_path, study_of(12, votes=3), 7)
    with ThreadPoolExecutor(7) as pool:
        trials = list(pool.map(lambda rater: rate_all(votes, rater), range(1, 8)))
    assert Counter(trial for row in trials for trial in row) == dict.fromkeys(range(12), 3)
    assert len(votes.all()) == 12 * 3 * 2
    votes.close()


def test_a_rater_compares_at_most_per_rater_captions(tmp_path: Path) -> None:
    study = study_of(20, per_rater=5, catches=("x", "y"), catch_every=3)
    votes = opened(tmp_path, study, 1)
    trials = rate_all(votes, 1)
    assert sum(not study.is_catch(trial) for trial in trials) == 5 == study.limit()
    assert [trial for trial in trials if study.is_catch(trial)] == [20, 21]
    assert votes.counts(1) == (5, 2)
    votes.close()


def test_votes_of_raters_who_fail_catch_trials_are_given_again(tmp_path: Path) -> None:
    """Two valid votes a caption, whoever fails, and when; the results agree."""
    study = study_of(6, votes=2, catches=("x", "y"), catch_every=3)
    votes = opened(tmp_path, study, 4)
    assert sorted(rate_all(votes, 1, wrong=True)) == list(range(8)), "fails both catch trials"
    assert sorted(rate_all(votes, 2)) == sorted(rate_all(votes, 3)) == list(range(8))
    assert votes.next_trial(4) is None, "two valid votes a caption"
    assert rate_all(votes, 1) == []
    body = study_results(study, votes.all(), votes.raters())
    assert [row["kept"] for row in body["raters"]] == [False, True, True, True]
    assert body["raters"][0]["reason"] == "0 of 4 answers in catch trials are right"
    assert body["missing"] == {"votes": 0, "captions": 0, "raters": 0}
    assert [sum(row["match"][name] for name in "ab") for row in body["by_caption"]] == [2] * 6
    votes.close()


def test_who_gives_few_votes_has_a_catch_trial_too(tmp_path: Path) -> None:
    """One caption is left of ten, whatever place the key draws for the catch trial."""
    study = study_of(10, votes=1, catches=("x",), catch_every=10)
    votes = opened(tmp_path, study, 8)
    for _ in range(10):
        trial = votes.next_trial(1)
        assert trial is not None
        votes.add(1, trial, answer_of(study, 1, trial))
    assert votes.counts(1) == (9, 1)
    assert [votes.next_trial(rater) for rater in range(2, 9)] == [10] * 7
    votes.close()


def test_what_a_failing_rater_sees_is_held_for_nobody(tmp_path: Path) -> None:
    study = study_of(1, votes=1, catches=("x",), catch_every=1)
    votes = opened(tmp_path, study, 3)
    assert votes.next_trial(1) == 1 and votes.next_trial(2) == 1
    votes.add(1, 1, answer_of(study, 1, 1, wrong=True))
    assert votes.next_trial(1) == 0, "nothing tells a rater"
    votes.add(2, 1, answer_of(study, 2, 1))
    assert votes.next_trial(2) == 0, "though rater 1 sees it"
    votes.add(1, 0, BOTH)
    body = study_results(study, votes.all(), votes.raters())
    assert body["missing"] == {"votes": 1, "captions": 1, "raters": 1}
    votes.add(2, 0, BOTH)
    assert {vote.rater for vote in votes.all() if vote.trial == 0} == {1, 2}
    assert votes.next_trial(3) is None, "no catch trial without a caption after it"
    votes.close()


def test_a_rater_who_recovers_counts_again(tmp_path: Path) -> None:
    """One of two right is too few, three of four are enough."""
    study = study_of(4, votes=1, catches=("x", "y"), catch_every=2)
    votes = opened(tmp_path, study, 1)
    failing = {}
    while (trial := votes.next_trial(1)) is not None:
        answer = answer_of(study, 1, trial)
        votes.add(1, trial, {**answer, "match": "neither"} if trial == 4 else answer)
        failing[trial] = votes._failing()
    assert (failing[4], failing[5]) == ("[1]", "[]")
    body = study_results(study, votes.all(), votes.raters())
    assert body["raters"][0]["catch_right"] == 3 and body["raters"][0]["kept"]
    votes.close()


def test_the_open_trial_is_kept_by_another_process(tmp_path: Path) -> None:
    study = study_of(10)
    votes = opened(tmp_path, study, 1)
    trial = votes.next_trial(1)
    again = Votes(tmp_path, study)
    assert again.next_trial(1) == trial
    assert again.was_shown(1, int(trial or 0)) and not again.was_shown(1, 99)
    votes.close()
    again.close()


def test_held_captions_are_given_to_others_after_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    votes = opened(tmp_path, study_of(1, votes=1), 3)
    assert votes.next_trial(1) == 0
    assert votes.next_trial(2) is None, "the first rater holds the only vote"
    monkeypatch.setattr(module, "HOLD", 0.0)
    assert votes.next_trial(2) == 0
    votes.add(1, 0, BOTH)
    with pytest.raises(NotShownError):
        votes.add(2, 0, BOTH)
    assert votes.next_trial(2) is None
    assert not votes.was_shown(2, 0), "forgotten: others have answered"
    assert [vote.rater for vote in votes.all()] == [1, 1]
    votes.close()


def test_double_votes_and_votes_without_a_page_are_refused(tmp_path: Path) -> None:
    votes = opened(tmp_path, study_of(3), 2)
    trial = votes.next_trial(1)
    assert trial is not None
    for rater, other in ((1, (trial + 1) % 3), (2, trial), (3, trial)):
        with pytest.raises(NotShownError):
            votes.add(rater, other, BOTH)
    votes.add(1, trial, BOTH)
    with pytest.raises(DoubleVoteError):
        votes.add(1, trial, {"realism": "right", "match": "right"})
    assert [(v.question, v.seat) for v in votes.all()] == [
        ("match", "neither"),
        ("realism", "left"),
    ]
    assert votes.counts(1) == (1, 0)
    votes.close()


def test_tokens_are_stored_as_digests(tmp_path: Path) -> None:
    study = study_of(3)
    create_votes(tmp_path, study)
    votes = Votes(tmp_path, study)
    ((number, token),) = votes.add_raters(1)
    assert len(token) == 32 and votes.rater_of(token) == number == 1
    assert votes.rater_of(token[:-1]) is None and votes.rater_of(sha256(token.encode())) is None
    assert votes.rater_of("\udcff") is None
    renewed = votes.replace_token(1)
    assert votes.rater_of(token) is None and votes.rater_of(renewed) == 1
    with pytest.raises(InputError, match="no rater 2"):
        votes.replace_token(2)
    assert [number for number, _ in votes.add_raters(2)] == [2, 3] and votes.raters() == [1, 2, 3]
    votes.close()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        columns = {
            row[1]
            for table in ("rater", "shown", "vote")
            for row in database.execute(f"PRAGMA table_info({table})")
        }
    known = {"number", "token", "rater", "trial", "since", "question", "picked", "seat", "seconds"}
    assert columns == known, "nothing else is kept about raters"


def test_votes_reach_the_disk_before_they_are_confirmed(tmp_path: Path) -> None:
    votes = opened(tmp_path, study_of(3), 1)
    assert votes._database.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    votes.close()


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    study = study_of(3)
    with pytest.raises(InputError, match=r"no .*votes\.db"):
        Votes(tmp_path, study)
    create_votes(tmp_path, study)
    with pytest.raises(InputError, match="votes of another study"):
        Votes(tmp_path, study_of(4))
    (tmp_path / DATABASE).write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match="not a study's database"):
        Votes(tmp_path, study)
    with pytest.raises(InputError, match="holds no study"):
        read_study(tmp_path)
    (tmp_path / FILE).write_bytes(study.sealed())
    assert read_study(tmp_path) == study
    (tmp_path / FILE).write_bytes(study.sealed().replace(b"caption 1", b"caption 9"))
    with pytest.raises(CorruptError):
        read_study(tmp_path)
