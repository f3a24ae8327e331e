"""Several data sets in one setting."""

from fractions import Fraction

import pytest

from core.storage.mixture import data_sets, mixture_problems, names_of, share_text


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("data/raw", [("data/raw", "1")]),
        ("A:0.7,B:0.3", [("A", "7/10"), ("B", "3/10")]),
        ("s3://b/x:.5, s3://b/y:1/2", [("s3://b/x", "1/2"), ("s3://b/y", "1/2")]),
        ("s3://b/run:2:0.5,a,b:0.5", [("s3://b/run:2", "1/2"), ("a,b", "1/2")]),
        ("A:1", [("A", "1")]),
        ("A,B", [("A,B", "1")]),
        ("s3://bucket/a", [("s3://bucket/a", "1")]),
        ("A:0.1,B:0.2,C:0.7", [("A", "1/10"), ("B", "1/5"), ("C", "7/10")]),
    ],
)
def test_a_share_follows_the_last_colon(text: str, sets: list[tuple[str, str]]) -> None:
    parsed = [(each.place, each.share) for each in data_sets(text)]
    assert parsed == [(place, Fraction(share)) for place, share in sets]
    assert mixture_problems(text, "data") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A:0.7,B:0.4", "the shares' sum is 1.1 and must be 1; write A:7/11,B:4/11"),
        ("A:2,B:1,C:1", "the shares' sum is 4 and must be 1; write A:0.5,B:0.25,C:0.25"),
        ("A:0.7,B", "'B' has no share; write A:0.7,B:0.3"),
        ("A:0.7,B:0.3,C", "'C' has no share; write A:0.7,B:0.3,C:SHARE"),
        ("A:0.7,B:-0.3", "'B:-0.3' has no share; write A:0.7,B:0.3"),
        ("A:0.7,s3://b/c:30%", "has no share; write A:0.7,s3://b/c:0.3"),
        ("A:x,B:0.3", "'A:x,B' was read as one place"),
        ("A:0.5,A:0.5", "A is given twice"),
        ("A:0,B:1", "the share of A is 0; leave it out"),
        ("A:1/0,B:1", None),
        ("gs://x:0.5,B:0.5", "'gs://x' is not a store"),
        ("s3://:0.5,B:0.5", "names no bucket"),
        ("A:0.1234567891,B:0.8765432109", "too many digits"),
    ],
)
def test_wrong_shares_are_refused_with_the_right_ones(text: str, problem: str | None) -> None:
    problems = mixture_problems(text, "data")
    assert problems == [] if problem is None else problem in "".join(problems)


def test_shares_and_names_are_short() -> None:
    assert [share_text(Fraction(x)) for x in ("1", "0.7", "1/3", "1/8")] == [
        "1",
        "0.7",
        "1/3",
        "0.125",
    ]
    assert names_of(["runs/x/data/tokens", "runs/y/data/tokens"]) == ["x", "y"]
    assert names_of(["a/b/", "a/c/b"]) == ["b", "c/b"]
    assert names_of(["data", "data/more"]) == ["data", "data/more"]
