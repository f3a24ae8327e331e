"""The rehearsed life of a run: its plan, its checks, the rule of its curves, and a small world."""

from pathlib import Path

import pytest

from cli.rehearse import rehearse_verb
from core.errors import ConfigError, InputError
from planning.life.config import Event, LifePlan
from planning.life.counts import COUNTED, REQUESTS, SAVE, Counts
from planning.life.curves import facts, table, too_fast
from planning.life.life import CONNECTIONS, RENDEZVOUS, Life, Spread, live


def test_losses_are_spread_before_the_preemption_and_rank_0_is_the_first() -> None:
    events = LifePlan(world=8).events()
    assert [event.step for event in events] == [2, 5, 7, 10, 12, 15]
    assert events[0] == Event(step=2, rank=0) and events[-1].rank is None
    assert all(event.rank in range(8) for event in events[:-1])
    every = LifePlan(world=8, checkpoints=6, every=3, losses=1).events()
    assert [event.step for event in every] == [3, 7], "7 + 2 steps, and saves at 12, 15 and 18"
    assert LifePlan(world=8, checkpoints=6, losses=0).events() == [Event(step=1, rank=None)]


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (LifePlan(world=1), "2 to 1024 ranks"),
        (LifePlan(world=8, checkpoints=10), "10 checkpoints are too few for 5 losses .* give 11"),
        (LifePlan(world=8, losses=-1), "must not be negative"),
    ],
)
def test_an_impossible_life_is_refused(plan: LifePlan, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        live(plan)


def test_settings_of_the_run_are_those_of_a_possible_run(tmp_path: Path) -> None:
    assert LifePlan(world=256).settings(tmp_path / "run").problems() == []
    assert LifePlan(world=11, checkpoints=11).problems() == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--life", "--world", "8,x"], "'x' is not a positive whole number"),
        (["--life", "--world", "8,1"], "2 to 1024 ranks"),
        (["--life", "tiny"], "tiny does not go with --life"),
        (["--life", "--jobs", "2"], "--jobs does not go with --life"),
        (["--life", "--losses", "30"], "give 36"),
    ],
)
def test_wrong_flags_start_nothing(arguments: list[str], text: str) -> None:
    with pytest.raises((InputError, ConfigError), match=text):
        rehearse_verb(arguments)


def _life(world: int, median: float, worst: float) -> Life:
    spread = Spread(median=median, worst=worst)
    return Life(
        plan=LifePlan(world=world),
        seconds={"a start": 1.25},
        counts={"messages": spread},
        with_time={"polls": spread},
    )


def test_counts_may_grow_with_the_logarithm_and_no_faster() -> None:
    """log2(64) is twice log2(8), so that 2.5 times as much is allowed."""
    assert too_fast([_life(64, 10, 25), _life(8, 4, 10)]) == []
    assert too_fast([_life(8, 4, 10)]) == []
    median, worst = too_fast([_life(8, 4, 10), _life(64, 10.1, 25.1)])
    assert median == "messages (median rank): 4 at 8 ranks, 10.1 at 64, above 10"
    assert worst.startswith("messages (worst rank): 10 at 8 ranks")
    assert facts([_life(8, 4, 10), _life(64, 10.1, 25)])["grows_with_log"] is False
    assert facts([_life(8, 4, 10), _life(64, 10, 25)])["grows_with_log"] is True
    assert facts([_life(8, 4, 10)])["grows_with_log"] is None, "one world has no curve"
    assert too_fast([_life(8, 0, 1), _life(64, 1, 1)]) != [], "nothing cannot grow"


def test_the_table_has_a_column_for_each_world() -> None:
    lines = table([_life(64, 10, 25), _life(8, 4.5, 10)])
    assert lines[0].split() == ["ranks", "8", "64"]
    assert lines[1].split() == ["a", "start,", "s", "1.2", "1.2"]
    assert lines[3].split() == ["messages", "4.5", "/", "10", "10", "/", "25"]


def test_requests_of_a_folder_are_counted(tmp_path: Path) -> None:
    counts = Counts()
    store = counts.store(str(tmp_path))
    store.put("a/b", b"c")
    assert store.get("a/b") == b"c" and store.names() == ["a/b"]
    assert store.head("a/b") == (1, "") and [e.name for e in store.entries()] == ["a/b"]
    store.delete("a/b")
    mark = counts.mark(SAVE, 3)
    assert mark["counts"] == {**dict.fromkeys(COUNTED, 0), REQUESTS: 6}
    assert (mark["what"], mark["step"]) == (SAVE, 3) and counts.marks == [mark]


@pytest.mark.slow
def test_a_small_world_lives(tmp_path: Path) -> None:
    """Rank 0 and another rank are killed, the job is preempted; `live` checks what is left: rows of
    metrics, checkpoints, leases, and each rank's weights in the finished model."""
    life = live(LifePlan(world=8, checkpoints=8, losses=2))
    assert all(seconds > 0 for seconds in life.seconds.values())
    connections, messages = life.counts[CONNECTIONS], life.counts["messages, a checkpoint"]
    assert connections.worst <= 1 + 2 * (2 * 3), "the store, and in two groups ranks 1, 2, 4 apart"
    assert messages.median < messages.worst
    calls = life.counts["collective calls, a checkpoint"]
    assert calls.median == calls.worst == 1, "the vote of a step"
    assert life.counts[RENDEZVOUS].median > 0 and too_fast([life]) == []
