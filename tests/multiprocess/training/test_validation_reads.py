"""What validations read: held-out records once a run, and nothing on ranks without data."""

import json
import shutil
from pathlib import Path

import pytest

from core.files.atomic import seal
from core.storage.store import FolderStore
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.manifest import TOKENS, read_manifest
from data_pipeline.tokenize.figures import ENTROPY
from models.config import PriorConfig
from parallel.config import EngineConfig, MeshConfig
from tests.harness import run_world
from training.config import CheckpointConfig, LoopConfig, PriorTrain
from training.run.folder import read_metrics
from training.stages import to_payload

STEPS, EVERY = 110, 5


def _settings(tokens: Path, out: Path) -> PriorTrain:
    """110 steps of a batch of one block, over three pipeline stages; 22 validations of a block."""
    every = {"log_every": 1, "validate_every": EVERY, "validation_samples": 8}
    return PriorTrain(
        data=str(tokens),
        out=out / "run",
        loop=LoopConfig(steps=STEPS, global_batch_size=8, **every),
        checkpoint=CheckpointConfig(every=1000, async_save=False),
        order=OrderConfig(lanes=2, shuffle_buffer=2),
        loader=LoaderConfig(readers=1, prefetch=2),
        engine=EngineConfig(name="deepspeed_pipe", precision="fp32", matmul_precision="highest"),
        mesh=MeshConfig(pipeline=3),
        model=PriorConfig(dim=16, heads=2, layers=3, text_length=8),
    )


@pytest.mark.world
def test_validations_read_once_and_ranks_without_data_nothing(tokens: Path, tmp_path: Path) -> None:
    """The tokens have no figures, as those of an older version."""
    old = tmp_path / "tokens"
    shutil.copytree(tokens, old)
    body = json.loads((old / "train/manifest.json").read_bytes())
    expected = body.pop("figures")[ENTROPY]
    (old / "train/manifest.json").write_bytes(seal(body))
    blocks = sum(s.blocks for s in read_manifest(FolderStore(old), "train/", TOKENS).shards)
    train = to_payload("prior", _settings(old, tmp_path))
    target = "tests.multiprocess.training.worlds:train_and_count_reads"
    first, middle, last = run_world(target, {"train": train, "out": str(tmp_path)}, 3)
    assert middle["reads"].get("train", 0) == middle["reads"].get("validation", 0) == 0
    for rank in (first, last):
        training = rank["reads"]["train"] - rank["reads"].get("entropy", 0)
        assert rank["reads"]["validation"] == 1 <= 0.01 * training
    assert first["reads"]["entropy"] >= blocks and "entropy" not in last["reads"] | middle["reads"]
    for rank in (first, middle, last):
        assert rank["entropies"] == [expected] * (STEPS // EVERY)
    rows = [r for r in read_metrics(tmp_path / "run") if r.get("split") == "validation"]
    assert [row["per_position_entropy"] for row in rows] == [expected] * (STEPS // EVERY)
