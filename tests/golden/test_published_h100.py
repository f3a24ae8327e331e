"""Published runs on H100s: the rows as their sources give them."""

from collections import Counter

import pytest

from planning.estimate.published_h100 import H100_RUNS, Run

PARAMETERS = {
    "MPT 760m": 760_470_528,
    "MPT 1b": 1_315_950_592,
    "MPT 3b": 2_651_837_440,
    "MPT 7b": 6_658_859_008,
    "MPT 13b": 12_853_954_560,
    "MPT 30b": 29_975_214_080,
    "MPT 70b": 64_862_437_376,
}
"""NumParams of llm-foundry's rows of 2048 tokens, which leave out biases."""


def test_half_of_the_rows_is_held_out() -> None:
    assert Counter(run.source for run in H100_RUNS) == {
        "torchtitan": 8,
        "OLMo-core": 4,
        "llm-foundry": 70,
    }
    assert [run.held_out for run in H100_RUNS[:4]] == [False, True, False, True]
    assert sum(run.held_out for run in H100_RUNS) == len(H100_RUNS) // 2


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_give_the_published_number_of_parameters(name: str) -> None:
    """Matrices of the blocks, tied embeddings and learned positions: to 0.1%."""
    run = next(r for r in H100_RUNS if r.name.startswith(f"{name}, 2048"))
    sizes = run.sizes
    blocks = sizes.layers * (4 * sizes.hidden**2 + 2 * sizes.hidden * sizes.wide)
    ends = (sizes.vocabulary + run.length) * sizes.hidden
    assert blocks + ends == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize(
    ("run", "share"),
    [
        pytest.param(run, share, id=run.name)
        for run, share in (
            (H100_RUNS[12], 41.25),
            (H100_RUNS[29], 40.6),
            (H100_RUNS[46], 28.59),
            (H100_RUNS[-1], 40.42),
        )
    ],
)
def test_throughput_and_sizes_give_the_published_share_of_the_peak(run: Run, share: float) -> None:
    """MFU by llm-foundry's formula, of 989.4 TFLOP/s, to 1%."""
    sizes = run.sizes
    blocks = sizes.layers * (4 * sizes.hidden**2 + 2 * sizes.hidden * sizes.wide)
    weights = blocks + (sizes.vocabulary + run.length) * sizes.hidden
    scores = 4 * sizes.layers * sizes.hidden * run.length
    flops = 3 * (2 * weights + scores) * run.measured
    assert 100 * flops / 989.4e12 == pytest.approx(share, rel=0.01)
