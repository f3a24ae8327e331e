"""The launcher reports, ends and cleans up."""

from pathlib import Path

import pytest

from core.errors import RankError
from tests.harness import run_world


@pytest.mark.world
def test_ranks_meet_and_report(tmp_path: Path) -> None:
    results = run_world("tests.multiprocess.training.worlds:sum_ranks", {"out": str(tmp_path)}, 3)
    assert [value for value, _ in results] == [6.0, 6.0, 6.0]
    assert len({pid for _, pid in results}) == 3


@pytest.mark.seconds
def test_a_failing_rank_fails_the_world(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed[\s\S]*planted failure"):
        run_world("tests.multiprocess.training.worlds:fail_on_rank_one", {"out": str(tmp_path)}, 2)
