"""Weights to start from in folders that are not the same on every node."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_world
from tests.unit.finished import write_models


def opened(out: Path) -> list[Any]:
    target = "tests.multiprocess.training.initial.places:open_on_own_node"
    return run_world(target, {"out": str(out)}, 2)


@pytest.mark.world
def test_other_or_no_weights_on_one_node_are_refused_by_all_ranks(tmp_path: Path) -> None:
    """Also where rank 0's node alone has them: no rank waits for another that has failed."""
    for seed in (0, 1):
        node = tmp_path / f"node-{seed}"
        models = write_models(tmp_path / f"models-{seed}", ["a red dot", "a blue square"], seed)
        node.mkdir()
        shutil.copytree(models.prior, node / "init")
    kinds, texts = zip(*opened(tmp_path), strict=True)
    assert kinds == ("InputError", "InputError") and texts[0] == texts[1]
    assert "rank 1: init: init holds other weights here (sha256 " in texts[0]
    assert "than on rank 0" in texts[0]
    shutil.rmtree(tmp_path / "node-1/init")
    kinds, texts = zip(*opened(tmp_path), strict=True)
    assert kinds == ("InputError", "InputError") and texts[0] == texts[1]
    assert texts[0].startswith("rank 1: init='init' holds neither a finished model")
    shutil.copytree(tmp_path / "node-0/init", tmp_path / "node-1/init")
    (first, digest), second = opened(tmp_path)
    assert first == "opened" and second == [first, digest]
