"""The table of renamed names is complete; flags, configs, run files, metrics and plans use it."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.config import CheckpointConfig
from cluster.chain import Resources
from cluster.config import SupervisorConfig
from core import renamed as table
from core.config import from_json, to_json
from core.errors import ConfigError, InputError
from core.flags import parse_over, with_new_flags
from core.known_flags import known_flags
from core.log import LOG
from core.renamed import FACTS, LAYOUT, RENAMED, ROW, renamed
from data_pipeline.config import LoaderConfig, OrderConfig
from generation.config import EvaluateConfig
from models.config import DVAEConfig
from parallel.config import EngineConfig, MeshConfig, OptimConfig
from planning.config import ClusterFlags
from training.config import (
    BPETrain,
    DVAETrain,
    LoopConfig,
    PriorTrain,
)
from training.recovery.config import GuardConfig
from training.run.metrics import row_of, rows_of
from workflow.run_file import read_runfile

CONFIGS = {
    kind.__name__: kind
    for kind in (
        *(LoopConfig, OptimConfig, EngineConfig, MeshConfig, OrderConfig, LoaderConfig),
        *(CheckpointConfig, GuardConfig, SupervisorConfig, DVAEConfig, DVAETrain, PriorTrain),
        *(BPETrain, EvaluateConfig, ClusterFlags, Resources),
    )
}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The deprecation notices of a fresh process."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(table, "_told", set())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    yield messages
    LOG.removeHandler(handler)


def test_the_table_names_what_there_is() -> None:
    assert set(RENAMED) - {FACTS, ROW, LAYOUT} == set(CONFIGS)
    for name, kind in CONFIGS.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        for old, new in RENAMED[name].items():
            assert new in fields and old not in fields, (name, old)


def test_an_old_config_equals_the_new_one(lines: list[str]) -> None:
    settings = PriorTrain(loop=LoopConfig(global_batch_size=8), caption_dropout=0.5)
    old = to_json(settings)
    old["loop"]["batch"] = old["loop"].pop("global_batch_size")
    old["caption_drop"] = old.pop("caption_dropout")
    for _ in range(2):
        assert from_json(PriorTrain, old, "config.json") == settings
    assert len(lines) == 1 and lines[0].startswith("config.json has old names")
    assert "loop.batch is now loop.global_batch_size" in lines[0]
    assert "caption_drop is now caption_dropout" in lines[0]
    with pytest.raises(ConfigError, match="did you mean 'loop'"):
        from_json(PriorTrain, {"lop": {}})


def test_the_new_name_wins_over_the_old() -> None:
    assert renamed(LoopConfig, {"stop_at": 1, "until": 2}) == {"stop_at": 1}
    assert renamed(LoopConfig, {"until": 2, "stop_at": 1}) == {"stop_at": 1}


def test_old_flags_are_read_and_told_once(lines: list[str]) -> None:
    flags = "--loop.until=4 --loop.batch 8 --checkpoint.no-background --engine.accumulate=2"
    settings = parse_over(PriorTrain(), [*flags.split(), "--optim.most_variance", "5"], "train")
    assert (settings.loop.stop_at, settings.loop.global_batch_size) == (4, 8)
    assert not settings.checkpoint.async_save and settings.engine.gradient_accumulation_steps == 2
    assert settings.optim.max_variance == 5.0
    assert len(lines) == 1 and "--loop.until is now --loop.stop-at" in lines[0]
    assert "--checkpoint.no-background is now --checkpoint.no-async-save" in lines[0]


@pytest.mark.parametrize(
    "flags",
    ["--loop.batch 8 --loop.global-batch-size 16", "--loop.global_batch_size=16 --loop.batch=8"],
)
def test_an_old_flag_beside_its_new_one_is_refused(flags: str) -> None:
    with pytest.raises(InputError, match=r"give --loop\.global-batch-size alone"):
        parse_over(PriorTrain(), flags.split(), "train")


def test_many_old_names_are_told_on_few_lines(lines: list[str]) -> None:
    old = [f"--{name}=1" for name in known_flags(PriorTrain).renamed if "background" not in name]
    with_new_flags(known_flags(PriorTrain).renamed, old)
    text = lines[0].splitlines()
    assert len(lines) == 1 and len(text) == 12 and max(map(len, text)) < 100
    assert text[0].endswith("still read:") and " is now " in text[1]
    assert text[-1] == f"  and {len(old) - 10} more (docs/decisions/021-names.md)"


def test_flags_without_prefix_and_values_stay() -> None:
    names = known_flags(EvaluateConfig, flat=True).renamed
    old = ["--most", "8", "few", "--few=2", "--no-most-x", "--mostly"]
    new = ["--max-candidates", "8", "few", "--max-candidates-prompts=2", "--no-most-x", "--mostly"]
    assert with_new_flags(names, old) == new


def test_old_rows_get_the_new_keys(tmp_path: Path, lines: list[str]) -> None:
    old = {"step": 1, "data_share": 0.5, "data_seconds": 0.1, "codes_share": 0.25, "loss": 2.0}
    row = row_of(json.dumps(old))
    new = ["step", "loss", "data_wait_fraction", "data_wait_seconds", "codebook_usage"]
    assert row is not None and sorted(row) == sorted(new)
    for _ in range(2):
        rows_of([json.dumps(old)] * 3, "metrics.jsonl")
    assert len(lines) == 1 and "data_share is now data_wait_fraction" in lines[0]
    assert row_of('{"step": 1, "data_share": "much"}') is None


def test_an_old_run_file_is_read(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: a\nout: runs/a\nstages:\n  tokenize: {workers: 4, at_once: 2}\n"
        "  prior: {flags: {loop.until: 3, loop.steps: 9}}\n  evaluate: {flags: {most: 20}}\n"
    )
    stages = read_runfile(path).stages
    assert stages["tokenize"].resources.parallelism == 2
    flags: dict[str, Any] = {name: stage.flags for name, stage in stages.items()}
    assert flags["prior"] == {"loop.stop_at": 3, "loop.steps": 9}
    assert flags["evaluate"] == {"max_candidates": 20}
    assert len(lines) == 1 and lines[0].startswith(str(path))


@pytest.mark.parametrize(
    "flags", ["loop.stop_at: 4, loop.until: 9", "loop.until: 9, loop.stop_at: 4", "loop.stop-at: 4"]
)
def test_the_new_name_wins_in_a_run_file_too(flags: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: a\nout: runs/a\nstages:\n  prior: {{flags: {{{flags}}}}}\n")
    assert read_runfile(path).stages["prior"].flags == {"loop.stop_at": 4}
