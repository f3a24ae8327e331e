"""Rows of benchmarks: bench/support/rows.py."""

from bench.support.rows import bench_row


def test_a_row_shows_the_median_of_its_ratios_unless_one_is_given() -> None:
    row = bench_row("step", 2.0, "s", "torch", [3.0, 1.0, 2.5])
    assert row == {
        "name": "step",
        "value": 2.0,
        "unit": "s",
        "baseline": "torch",
        "ratio": 2.5,
        "spread": [1.0, 3.0],
    }
    assert bench_row("step", 2.0, "s", "torch", [3.0, 1.0], ratio=2.2)["ratio"] == 2.2
