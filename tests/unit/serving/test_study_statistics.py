"""Shares, intervals and agreement against numbers worked out by hand or published."""

import json

import numpy as np
import pytest

from serving.study.report import findings
from serving.study.results import by_caption, missing_votes, study_results
from serving.study.statistics import (
    agreeing_pairs,
    alpha,
    majority,
    percentiles,
    resampled,
    shares,
    wilson,
)
from serving.study.study import QUESTIONS, Study
from serving.study.votes import Vote


def one(counts: list[list[int]]) -> float:
    table = np.array(counts)
    return float(alpha(table, np.ones((1, len(table))))[0])


@pytest.mark.parametrize(
    "successes,trials,low,high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    successes: int, trials: int, low: float, high: float
) -> None:
    interval = wilson(successes, trials)
    assert interval is not None
    assert (round(interval[0], 4), round(interval[1], 4)) == (low, high)


def test_without_trials_there_is_no_interval() -> None:
    assert wilson(0, 0) is None


def test_alpha_is_krippendorffs_own_example() -> None:
    """Computing Krippendorff's alpha-reliability, 2011, section C: 12 units, 4 observers, 0.743."""
    a = "1 2 3 3 2 1 4 1 2 . . ."
    b = "1 2 3 3 2 2 4 1 2 5 . 3"
    c = ". 3 3 3 2 3 4 2 2 5 1 ."
    d = "1 2 3 3 2 4 4 1 2 5 1 ."
    units = zip(*(row.split() for row in (a, b, c, d)), strict=True)
    counts = [[unit.count(str(value)) for value in range(1, 6)] for unit in units]
    assert round(one(counts), 3) == 0.743


def test_alpha_by_hand() -> None:
    """Two captions, 3:0 and 1:2. Unlike ordered pairs 0 and 4, over 2: observed 2 / 6.

    Votes are 4 and 2 of 6: expected 2 * 4 * 2 / (6 * 5).
    """
    assert one([[3, 0], [1, 2]]) == pytest.approx(1 - (2 / 6) / (16 / 30))
    assert one([[3, 0], [0, 3]]) == 1.0
    assert np.isnan(one([[3, 0], [3, 0]])), "one choice alone: undefined"
    assert np.isnan(one([[1, 0], [0, 1]])), "no pairs"


def test_a_weight_of_two_is_the_caption_twice() -> None:
    counts = np.array([[3, 0], [1, 2], [0, 2]])
    twice = counts[[0, 1, 1, 2]]
    weighted = alpha(counts, np.array([[1, 2, 1]]))[0]
    assert weighted == pytest.approx(alpha(twice, np.ones((1, 4)))[0])
    assert shares(counts, np.array([[1, 2, 1]]))[0].tolist() == [5 / 11, 6 / 11]


def test_agreeing_pairs_are_fleisss_mean() -> None:
    """Fleiss's example as in the textbooks: 14 raters, 10 subjects, 5 categories: 0.378."""
    rows = "00 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2"
    counts = [[int(n) for n in row.split()] for row in f"{rows}|6 5 2 1 0|0 2 2 3 7".split("|")]
    assert agreeing_pairs(np.array(counts)) == pytest.approx(0.378, abs=5e-4)
    assert agreeing_pairs(np.array([[1, 0]])) is None


def test_bootstrap_percentiles_of_two_captions() -> None:
    """Of 0 and 1 with replacement: means 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4."""
    weights = resampled(2, 0, "two")
    assert weights.shape == (2000, 2) and (weights.sum(1) == 2).all()
    drawn = shares(np.array([[1, 0], [0, 1]]), weights)[:, 0]
    count = [(drawn == value).sum() / 2000 for value in (0.0, 0.5, 1.0)]
    assert count == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    assert percentiles(drawn) == (0.0, 1.0)
    assert (weights == resampled(2, 0, "two")).all(), "by key"
    assert percentiles(np.array([np.nan])) is None
    assert percentiles(np.arange(101.0)) == (2.5, 97.5)


def test_a_majority_is_more_than_half() -> None:
    rows = [([3, 2, 0], 0), ([2, 3, 0], 1), ([1, 1, 3], 2), ([2, 2, 1], None), ([2, 2, 0], None)]
    assert [majority(np.array(row)) for row, _ in rows] == [choice for _, choice in rows]


def study(**changes: object) -> Study:
    settings = {
        "a": "one",
        "b": "two",
        "captions": ("first", "second", "third", "fourth"),
        "catches": ("first",),
        "votes": 5,
        "per_rater": 0,
        "catch_every": 10,
        "catch_least": 0.75,
        "seed": 0,
        "drawn": {},
    }
    return Study(**{**settings, **changes})  # type: ignore[arg-type]


def votes_of(table: dict[int, str], question: str, trial: int) -> list[Vote]:
    seats = {"a": "left", "b": "right", "n": "neither"}
    return [
        Vote(
            rater=rater,
            trial=trial,
            question=question,
            picked="neither" if letter == "n" else letter,
            seat=seats[letter],
            seconds=2.0 * rater,
        )
        for rater, letters in table.items()
        for letter in letters
    ]


def all_votes() -> list[Vote]:
    """Five raters; the fifth fails the catch trial; the fourth caption has two votes."""
    rows = {
        "match": ["aabna", "aaabb", "abnnb", "ab"],
        "realism": ["aabba", "bbbaa", "aaaab", "ba"],
    }
    votes = []
    for question, captions in rows.items():
        for trial, letters in enumerate(captions):
            votes += votes_of(dict(enumerate(letters, 1)), question, trial)
        votes += votes_of(dict(enumerate("aaaab", 1)), question, 4)
    return votes


def test_figures_by_hand() -> None:
    body = study_results(study(), all_votes(), [1, 2, 3, 4, 5])
    assert [row["kept"] for row in body["raters"]] == [True, True, True, True, False]
    assert body["raters"][4]["reason"] == "0 of 2 answers in catch trials are right"
    assert body["raters"][0] == {
        "rater": 1,
        "captions": 4,
        "catch_right": 2,
        "catch_asked": 2,
        "left": 6,
        "sides": 8,
        "median_seconds": 2.0,
        "kept": True,
        "reason": "",
    }
    # Without rater 5: aabn, aaab, abnn, ab(too few)
    match = body["questions"]["match"]
    assert (match["captions"], match["captions_with_too_few_votes"]) == (3, 1)
    assert {name: row["captions"] for name, row in match["majority"].items()} == {
        **{"a": 1, "b": 0, "neither": 0, "none": 2}
    }
    assert match["majority"]["a"]["share"] == pytest.approx(1 / 3)
    low, high = match["majority"]["a"]["low"], match["majority"]["a"]["high"]
    assert (round(low, 4), round(high, 4)) == (0.0615, 0.7923)
    assert {name: row["votes"] for name, row in match["votes"].items()} == {
        **{"a": 6, "b": 3, "neither": 3}
    }
    assert match["votes"]["a"]["share"] == 0.5
    assert match["votes"]["a"]["low"] < 0.5 < match["votes"]["a"]["high"]
    # pairs that agree: 1 of 6, 3 of 6, 1 of 6
    assert match["agreement"]["agreeing_pairs"] == pytest.approx(5 / 18)
    # unlike ordered pairs 10, 6, 10 over 3: 26/3 of 12 votes; expected (144 - 36 - 9 - 9) / 132
    assert match["agreement"]["alpha"] == pytest.approx(1 - (26 / 36) / (90 / 132))
    realism, match_line, missing = findings({**body, "questions": body["all_raters"]})
    assert realism == (
        "More realistic: A has the majority on 2 of 3 captions, 66.7% (95% interval 20.8% to "
        "93.9%), B on 1, no majority on 0."
    )
    assert match_line.startswith("Matches the caption better: A has the majority on 2 of 3")
    assert match_line.endswith("B on 0, neither on 0, no majority on 1.")
    # five votes each were planned, and 4, 4, 4, 2 are valid
    assert body["missing"] == {"votes": 6, "captions": 4, "raters": 3}
    assert missing.startswith("6 votes are missing, on 4 captions.")
    # With rater 5: aabna a, aaabb a, abnnb none: realism aabba a, bbbaa b, aaaab a
    everybody = body["all_raters"]
    assert {name: row["captions"] for name, row in everybody["match"]["majority"].items()} == {
        **{"a": 2, "b": 0, "neither": 0, "none": 1}
    }
    assert {name: row["captions"] for name, row in everybody["realism"]["majority"].items()} == {
        **{"a": 2, "b": 1, "none": 0}
    }


def test_captions_are_listed_with_their_votes() -> None:
    rows = by_caption(study(), all_votes(), {1, 2, 3, 4, 5})
    assert rows[2] == {
        "caption": "third",
        "realism": {"a": 4, "b": 1, "majority": "a"},
        "match": {"a": 1, "b": 2, "neither": 2, "majority": "none"},
    }
    assert rows[3]["match"] == {"a": 1, "b": 1, "neither": 0, "majority": "none"}


def test_missing_votes_need_raters_who_may_give_them() -> None:
    rows = votes_of({1: "a"}, "realism", 0) + votes_of({1: "a", 2: "b"}, "realism", 1)
    two = study(captions=("first", "second"), votes=2, per_rater=1)
    assert missing_votes(two, rows, {1, 2}) == {"votes": 1, "captions": 1, "raters": 1}
    assert missing_votes(two, rows, {1}) == {"votes": 2, "captions": 2, "raters": 2}
    assert missing_votes(two, rows, set()) == {"votes": 4, "captions": 2, "raters": 4}
    assert missing_votes(study(captions=("a", "b")), [], set())["raters"] == 5


@pytest.mark.parametrize("letters,neither,none", [("aabb", 0, 4), ("nnnn", 4, 0)])
def test_all_ties_are_told(letters: str, neither: int, none: int) -> None:
    votes = [vote for t in range(4) for vote in votes_of(dict(enumerate(letters, 1)), "match", t)]
    votes += [v for t in range(4) for v in votes_of(dict(enumerate("abab", 1)), "realism", t)]
    body = study_results(study(votes=4), votes, [1, 2, 3, 4])
    realism, match = findings(body)
    assert realism.endswith("B on 0, no majority on 4.")
    assert match == (
        "Matches the caption better: A has the majority on 0 of 4 captions, 0.0% (95% interval "
        f"0.0% to 49.0%), B on 0, neither on {neither}, no majority on {none}."
    )
    json.dumps(body, allow_nan=False)


@pytest.mark.parametrize("planned,counted", [(5, 0), (1, 4)])
def test_one_rater_alone(planned: int, counted: int) -> None:
    """Of five planned votes one is too few; of one it is all, and no agreement is defined."""
    votes = [v for t in range(4) for q in QUESTIONS for v in votes_of({1: "a"}, q, t)]
    body = study_results(study(votes=planned), votes, [1])
    for part in body["questions"].values():
        assert part["captions"] == counted == part["majority"]["a"]["captions"]
        if counted:
            assert part["agreement"] == dict.fromkeys(("alpha", "low", "high", "agreeing_pairs"))
    json.dumps(body, allow_nan=False)


def test_raters_can_be_left_out() -> None:
    body = study_results(study(catch_least=0.0), all_votes(), [1, 2, 3, 4, 5], without=[1])
    assert [row["kept"] for row in body["raters"]] == [False, True, True, True, True]
    assert body["questions"]["realism"]["votes"]["a"]["votes"] == 2 + 2 + 3
    alone = study_results(study(catch_least=0.0), all_votes(), [1, 2, 3, 4, 5])
    assert "all_raters" not in alone
    assert "all_raters" in body


def test_a_study_without_votes_has_no_figures() -> None:
    body = study_results(study(), [], [1])
    realism = body["questions"]["realism"]
    assert realism["captions"] == 0 and realism["captions_with_too_few_votes"] == 4
    assert realism["majority"]["a"] == {"captions": 0, "share": None, "low": None, "high": None}
