"""The cost model against published runs: Narayanan et al. 2021, arXiv 2104.04473, table 1."""

import pytest

from planning.estimate.published import RUNS, Dense, predict


def test_throughput_of_published_runs_is_predicted() -> None:
    """Within 10% on average (issue 7), and no row is far off."""
    errors = {run.name: predict(run).tflops / run.measured - 1 for run in RUNS}
    assert sum(abs(error) for error in errors.values()) / len(errors) < 0.10, errors
    assert all(abs(error) < 0.15 for error in errors.values()), errors


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_operations_of_published_runs_equal_their_formula(run: Dense) -> None:
    """A layer's matmuls count four times, the head's three times: within 2%."""
    h, rows = run.hidden, run.batch * 2048
    layer = 24 * rows * h * h + 4 * rows * 2048 * h
    head = 2 * rows * 51_200 * h
    assert run.step_flops == pytest.approx(4 * run.layers * layer + 3 * head, rel=0.02)


def test_predictions_between_the_rows_are_smooth() -> None:
    """Every size from 1.7B to 1008B is within the published range, or 5% outside it."""
    sizes = [(32, 3072, 30, 2, 1, 64, 512), (48, 6144, 40, 8, 1, 256, 1024)]
    sizes += [(80, 10240, 60, 8, 4, 1024, 1792), (128, 16384, 96, 8, 16, 1920, 2160)]
    for heads, hidden, layers, tensor, pipeline, gpus, batch in sizes:
        run = Dense(
            name=str(hidden),
            heads=heads,
            hidden=hidden,
            layers=layers,
            tensor=tensor,
            pipeline=pipeline,
            gpus=gpus,
            batch=batch,
            measured=0.0,
        )
        assert 0.95 * 137 < predict(run).tflops < 1.05 * 163
