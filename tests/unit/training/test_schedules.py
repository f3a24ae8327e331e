"""Learning rate and plateaus as functions of the step; settings that cannot be run."""

import pytest

from core.errors import ConfigError
from data_pipeline.config import OrderConfig
from parallel.config import MeshConfig, OptimConfig
from training.config import LoopConfig, PriorTrain
from training.launch import train_stage
from training.schedules import Plateau, learning_rate

OPTIM = OptimConfig(lr=1.0, final_lr=0.1, warmup=10, halvings=2, patience=2, plateau_threshold=0.01)


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    rates = [learning_rate(OPTIM, step, 100) for step in range(11)]
    assert rates == pytest.approx([*(i / 10 for i in range(1, 11)), 1.0])


def test_a_cosine_ends_at_its_share_and_is_held() -> None:
    optim = OptimConfig(lr=1.0, final_lr=0.1, warmup=0, decay_fraction=0.5)
    assert learning_rate(optim, 25, 100) == pytest.approx(0.55)
    assert [learning_rate(optim, step, 100) for step in (50, 99)] == pytest.approx([0.1, 0.1])


def test_the_rate_is_halved_where_the_loss_stops_falling() -> None:
    plateau, halved = Plateau(), []
    losses = [9.0, 5.0, 4.99, 4.98, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    for i, loss in enumerate(losses):
        if plateau.observe(OPTIM, 10 + i, loss):
            halved.append(i)
    assert halved == [3, 6], "4.99 and 4.98 are no gain of 1%; then two level ones; then no more"
    assert learning_rate(OPTIM, 50, 100, plateau.halved) == 0.25


def test_a_part_of_a_run_ends_at_a_step_of_it() -> None:
    assert LoopConfig(steps=9).end == 9 and LoopConfig(steps=9, stop_at=4).end == 4
    assert not LoopConfig(steps=9, stop_at=9).problems()
    for until in (-1, 10):
        assert (
            f"stop_at={until} must be 0 (all steps)"
            in LoopConfig(steps=9, stop_at=until).problems()[0]
        )


def test_validations_in_the_warm_up_do_not_count() -> None:
    plateau = Plateau()
    assert not any(plateau.observe(OPTIM, 5, 1.0) for _ in range(9)) and plateau == Plateau()


def test_a_plateau_survives_a_checkpoint() -> None:
    plateau, again = Plateau(), Plateau()
    for loss in (3.0, 3.0, 3.0, 2.0, 2.0):
        plateau.observe(OPTIM, 20, loss)
    again.load(plateau.state())
    assert again == plateau and plateau.halved == 1 and plateau.since == 1
    again.load({})
    assert again == Plateau()
    fresh = Plateau()
    fresh.load(Plateau().state())
    assert fresh == Plateau()


def test_plateaus_need_validations() -> None:
    settings = PriorTrain(optim=OPTIM, loop=LoopConfig(validate_every=0))
    assert any("optim.halvings needs validations" in problem for problem in settings.problems())


def test_a_mesh_for_a_cluster_is_not_started_on_one_machine() -> None:
    world = 2**20
    settings = PriorTrain(
        loop=LoopConfig(global_batch_size=world, validation_samples=world),
        mesh=MeshConfig(data=world),
        order=OrderConfig(lanes=world),
    )
    with pytest.raises(ConfigError, match=f"needs {world} ranks, too many for the"):
        train_stage("prior", settings)
