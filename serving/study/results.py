"""The figures of a study: majority shares, votes, agreement, and who is left out.

A caption counts if more than half of its planned votes are there (3 of 5). It goes to the choice
with more than half of the votes that it has, and to "none" if there is no such choice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.files.atomic import Json
from serving.study.statistics import (
    Counts,
    Interval,
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

NONE = "none"
METHOD = (
    "A caption counts if more than half of its planned votes are there. Its majority is the choice "
    "with more than half of its votes, else none. Intervals are 95%: Wilson's for shares of "
    "captions, and for shares of votes and alpha percentiles of 2,000 bootstrap samples of "
    "captions. Agreement is Krippendorff's nominal alpha (1 full, 0 chance), and the share of "
    "pairs of raters who picked the same."
)


@dataclass(frozen=True, kw_only=True)
class RaterFacts:
    """What is known of one rater."""

    rater: int
    captions: int
    catch_right: int
    """Right answers in catch trials; each trial has two questions."""
    catch_asked: int
    left: int
    """Answers for the picture on the left, of `sides`."""
    sides: int
    """Answers that are left or right, without those of catch trials."""
    median_seconds: float | None
    kept: bool
    reason: str
    """Why the votes are left out; empty if they count."""


def study_results(
    study: Study, votes: Sequence[Vote], raters: Sequence[int], without: Iterable[int] = ()
) -> Json:
    """All figures, as JSON.

    Where raters are left out, `all_raters` has the figures with their votes.
    """
    facts = [_rater(study, votes, rater, set(without)) for rater in raters]
    kept = {row.rater for row in facts if row.kept}
    valid = {row.rater for row in facts if study.is_valid(row.catch_right, row.catch_asked)}
    body: Json = {
        "study": study.digest,
        "a": study.a,
        "b": study.b,
        "captions": len(study.captions),
        "votes_per_caption": study.votes,
        "catch_least": study.catch_least,
        "drawn": study.drawn,
        "raters": [vars(row) for row in facts],
        "missing": missing_votes(study, votes, valid),
        "questions": figures(study, votes, kept),
        "by_caption": by_caption(study, votes, kept),
        "method": METHOD,
    }
    if len(kept) < len(facts):
        body["all_raters"] = figures(study, votes, set(raters))
    return body


def missing_votes(study: Study, votes: Sequence[Vote], valid: set[int]) -> Json:
    """Valid votes that the study lacks, the captions that lack them, and how many new raters can
    give them: a rater has one vote a caption, and at most `per_rater` captions."""
    given = count_votes(study, votes, valid, "realism").sum(1)
    lacking = np.maximum(study.votes - given, 0)
    total = int(lacking.sum())
    return {
        "votes": total,
        "captions": int((lacking > 0).sum()),
        "raters": max(int(lacking.max()), -(-total // study.limit())),
    }


def figures(study: Study, votes: Sequence[Vote], raters: set[int]) -> Json:
    """The figures of each question, from the votes of some raters."""
    return {question: _figures(study, votes, raters, question) for question in QUESTIONS}


def by_caption(study: Study, votes: Sequence[Vote], raters: set[int]) -> list[Json]:
    """Votes and majority of each caption and question."""
    rows: list[Json] = [{"caption": caption} for caption in study.captions]
    for question, choices in QUESTIONS.items():
        for row, counts in zip(rows, count_votes(study, votes, raters, question), strict=True):
            chosen = majority(counts) if counts.sum() >= least_votes(study) else None
            row[question] = {
                **dict(zip(choices, counts.tolist(), strict=True)),
                "majority": NONE if chosen is None else choices[chosen],
            }
    return rows


def least_votes(study: Study) -> int:
    """Votes that a caption must have: more than half of those planned."""
    return study.votes // 2 + 1


def count_votes(study: Study, votes: Iterable[Vote], raters: set[int], question: str) -> Counts:
    """How many of the raters picked each choice for each caption, (captions, choices)."""
    choices = QUESTIONS[question]
    counts = np.zeros((len(study.captions), len(choices)), np.int64)
    for vote in votes:
        if vote.question == question and vote.rater in raters and not study.is_catch(vote.trial):
            counts[vote.trial, choices.index(vote.picked)] += 1
    return counts


def _figures(study: Study, votes: Sequence[Vote], raters: set[int], question: str) -> Json:
    choices, counts = QUESTIONS[question], count_votes(study, votes, raters, question)
    enough = counts.sum(1) >= least_votes(study)
    counts = counts[enough]
    chosen = [majority(row) for row in counts]
    wins = {name: chosen.count(i) for i, name in enumerate(choices)}
    wins[NONE] = chosen.count(None)
    body: Json = {
        "captions": len(counts),
        "captions_with_too_few_votes": int((~enough).sum()),
        "majority": {
            name: {"captions": n, **_share(n, len(counts), wilson(n, len(counts)))}
            for name, n in wins.items()
        },
    }
    if not len(counts):
        return {**body, "votes": {}, "agreement": {}}
    once, weights = np.ones((1, len(counts))), resampled(len(counts), study.seed, question)
    spread, totals = shares(counts, weights), counts.sum(0)
    body["votes"] = {
        name: {
            "votes": int(totals[i]),
            **_share(int(totals[i]), int(totals.sum()), percentiles(spread[:, i])),
        }
        for i, name in enumerate(choices)
    }
    value = float(alpha(counts, once)[0])
    low, high = _ends(percentiles(alpha(counts, weights)))
    body["agreement"] = {
        "alpha": value if np.isfinite(value) else None,
        "low": low,
        "high": high,
        "agreeing_pairs": agreeing_pairs(counts),
    }
    return body


def _share(count: int, of: int, interval: Interval) -> Json:
    low, high = _ends(interval)
    return {"share": count / of if of else None, "low": low, "high": high}


def _ends(interval: Interval) -> tuple[float | None, float | None]:
    return interval if interval is not None else (None, None)


def _rater(study: Study, votes: Sequence[Vote], rater: int, without: set[int]) -> RaterFacts:
    own = [vote for vote in votes if vote.rater == rater]
    catches = [vote for vote in own if study.is_catch(vote.trial)]
    others = [vote for vote in own if not study.is_catch(vote.trial)]
    sides = [vote.seat for vote in others if vote.seat != "neither"]
    right = sum(vote.picked == "a" for vote in catches)
    reason = ""
    if rater in without:
        reason = "asked for (--without)"
    elif not study.is_valid(right, len(catches)):
        reason = f"{right} of {len(catches)} answers in catch trials are right"
    return RaterFacts(
        rater=rater,
        captions=len({vote.trial for vote in others}),
        catch_right=right,
        catch_asked=len(catches),
        left=sides.count("left"),
        sides=len(sides),
        median_seconds=_median([vote.seconds for vote in others]),
        kept=not reason,
        reason=reason,
    )


def _median(values: Sequence[Any]) -> float | None:
    return float(np.median(values)) if values else None
