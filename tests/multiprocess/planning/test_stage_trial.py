"""Steps of whole stages are timed on real ranks, from small sizes to the first that is too slow."""

from dataclasses import replace

import pytest

from planning.calibration.stage_trial import time_sizes
from tests.unit.workflow.test_own_pairs import PAIRS
from workflow.own_pairs.sizes import SIZES, settings_of


@pytest.mark.slow
def test_sizes_are_timed_until_one_is_too_slow() -> None:
    small = replace(SIZES[0], width=4, dim=24, heads=2, layers=1, codebook=16)
    sizes = [settings_of(size, PAIRS) for size in (small, replace(small, pixels=64), small)]
    least = {"dvae": 1, "clip": 1, "prior": 1}
    rows = time_sizes(sizes[:2], least, 1e9)
    assert len(rows) == 2 and all(set(row) == set(least) for row in rows)
    assert all(0 < seconds < 60 for row in rows for seconds in row.values())
    assert len(time_sizes(sizes, least, 0.0)) == 1
