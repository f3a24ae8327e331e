"""The figure of `python -m bench finetune`."""

from bench.finetune.parent import EVERY, STEPS, _fraction, _row


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10.0 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


def test_the_figure_is_steps_to_the_lowest_fresh_loss_over_its_steps() -> None:
    fresh = curve(3.0, 2.0, 1.0, 1.5)
    assert _fraction("loss", fresh, curve(1.0)) == 10 / 30
    assert _fraction("loss", fresh, curve(1.2, 0.9, 1.3)) == 20 / 30
    assert _fraction("loss", fresh, curve(1.2, 1.1)) == (STEPS + EVERY) / 30
    row = _row("a from b", "loss", [fresh, fresh], [curve(1.0), curve(2, 1)])
    assert (row["value"], row["spread"]) == (0.5, [1.5, 3.0])
