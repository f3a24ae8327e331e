"""What a stage keeps at a time, counted by hand from its order of passes."""

import pytest

from parallel.pipelines.schedules import Schedule
from planning.estimate.fsdp.flight import Kept, most_kept

ONE = Kept(layers=1)


@pytest.mark.parametrize(
    ("schedule", "chunks", "by_stage"),
    [
        ("1f1b", 1, [2, 1]),
        ("interleaved", 2, [5, 3]),  # two passes ahead for each later stage, and a round
        ("zero-bubble", 1, [2, 2]),  # the second stage's weights wait for a micro-batch
        ("zero-bubble", 2, [4, 4]),
    ],
)
def test_two_stages_of_four_micro_batches(
    schedule: Schedule, chunks: int, by_stage: list[int]
) -> None:
    kept = [most_kept(schedule, stage, 2, 4, [ONE] * chunks) for stage in (0, 1)]
    assert kept == by_stage


def test_chunks_count_by_their_own_bytes() -> None:
    """F0 F0 of the first chunk, then one of the second at a time."""
    chunks = [Kept(layers=1), Kept(layers=10)]
    assert most_kept("interleaved", 1, 2, 4, chunks) == 2 + 10


def test_a_zero_bubble_keeps_the_loss_until_the_first_half() -> None:
    last = [Kept(layers=10, loss=3)]
    assert most_kept("zero-bubble", 1, 2, 4, last) == 10 + 13
    assert most_kept("1f1b", 1, 2, 4, last) == 13
    assert most_kept("zero-bubble", 1, 2, 1, last) == 13
