"""Pins of the dVAE's task: the device of its batches, and the FID of its reconstructions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.unit.training.test_pins_training import _dvae_task, _picture
from training.tasks import dvae as dvae_task


class _World:
    """The world of one of two ranks; what rank 0 has is 7."""

    def __init__(self, rank: int) -> None:
        self.rank, self.device = rank, "cpu"

    def of_rank_0(self, value: float) -> float:
        return 7.0 if self.rank else value

    def gather_text(self, text: str) -> list[str]:
        return [text]


def _network(pictures: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """One feature, the first byte; two logits."""
    first = pictures[:, :1, 0, 0].astype(np.float64)
    return first, np.repeat(first + 100, 2, 1)


def test_a_step_s_batch_is_on_the_cpu() -> None:
    """Under another default device; `meta` holds no values."""
    with torch.device("meta"):
        batch = _dvae_task(augment=False).batch([_picture(1)], 0)
    assert {name: value.device.type for name, value in batch.items()} == dict.fromkeys(batch, "cpu")
    assert set(batch) == {"pixels", "keys", "tau", "beta"}


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_has_an_inception(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvae_task, "Inception", lambda *arguments: arguments)
    task = _dvae_task()
    task._world = cast(Any, _World(rank))
    task._set_inception(Path("weights"))
    assert task._inception == (None if rank else (Path("weights"), "cpu"))


@pytest.mark.parametrize(("rank", "has", "distance"), [(0, True, 6.0), (0, False, 0.0),
                                                       (1, False, 7.0)])  # fmt: skip
def test_the_fid_of_reconstructions_by_hand(rank: int, has: bool, distance: float) -> None:
    """Features of 0 and 2, then of 3 and 3: 2^2 between the means, and 2 + 0."""
    task, beats = _dvae_task(), list[str]()
    task._world = cast(Any, _World(rank))
    task._inception = cast(Any, _network) if has else None
    first, again = (
        torch.tensor(values, device="cpu").view(2, 1, 1, 1).expand(2, 3, 4, 4) / 255
        for values in ([0.0, 2.0], [3.0, 3.0])
    )
    assert task._rfid(first, again, beats.append) == pytest.approx(distance)
    assert beats == ["rfid", "rfid"] * has


def test_features_are_extracted_of_32_pictures_at_a_time() -> None:
    beats, ramp = list[str](), torch.arange(65.0).view(65, 1, 1, 1).expand(65, 3, 2, 2) / 255
    features = dvae_task._features(cast(Any, _network), ramp, beats.append)
    assert features.tolist() == [[float(i)] for i in range(65)]
    assert beats == ["rfid"] * 3


@torch.no_grad()
@pytest.mark.parametrize("asked", [None, Path("weights")])
def test_figures_hold_the_fid_if_it_is_asked_for(
    asked: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _dvae_task(rfid=asked)
    grey = torch.full((1, 3, 8, 8), 0.5)
    task.dvae = cast(Any, SimpleNamespace(
        parameters=lambda: iter([grey]),
        tokens=lambda image: torch.zeros(len(image), 16, dtype=torch.int64),
        picture=lambda codes: grey.expand(len(codes), -1, -1, -1),
    ))  # fmt: skip
    monkeypatch.setattr(task, "_rfid", lambda pixels, again, beat: float(len(pixels) + len(again)))
    records = [_picture(i) for i in range(3)]
    figures, _ = task.figures(cast(Any, None), records, records)
    assert figures.get("rfid") == (6.0 if asked else None)
