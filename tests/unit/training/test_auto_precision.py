"""`engine.precision auto`: which precision it becomes, on every rank, and that a run keeps it."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.log import LOG
from parallel.config import LEAST_GAIN, EngineConfig
from parallel.device import CPU
from parallel.engines.protocol import Stage
from parallel.precision import engine_numerics, medium_is_accurate, set_numerics
from parallel.world import World
from planning.estimate.hardware import KNOWN
from planning.estimate.search import layouts
from tests.chain import Chain
from training import auto_precision
from training.auto_precision import cpu_rates, fastest, settle_precision
from training.config import PriorTrain
from training.presets import prior_tiny

FAST, SLOW = {"fp32": 100.0, "bf16": 400.0}, {"fp32": 140.0, "bf16": 2.0}
AUTO = EngineConfig(precision="auto")


def _precision(*ranks: dict[str, float]) -> str:
    return fastest(ranks)["precision"]


def test_the_faster_precision_is_chosen_and_16_bits_must_gain() -> None:
    assert _precision(FAST) == "bf16" and _precision(SLOW) == "fp32"
    assert _precision({"fp32": 100.0, "bf16": 100 * LEAST_GAIN}) == "bf16"
    assert _precision({"fp32": 100.0, "bf16": 99.9 * LEAST_GAIN}) == "fp32"


def test_fp32s_other_kernels_are_taken_where_they_gain_and_bf16_is_compared_with_them() -> None:
    xeon = {"fp32": 138.0, "fp32 medium": 97.0, "bf16": 77.0}
    assert fastest([xeon]) == {"precision": "fp32", "matmul_precision": "highest"}
    zen = {"fp32": 100.0, "fp32 medium": 200.0, "bf16": 240.0}
    assert fastest([zen]) == {"precision": "fp32", "matmul_precision": "medium"}
    assert fastest([{**zen, "bf16": 250.0}])["precision"] == "bf16"
    assert fastest([zen, SLOW]) == {"precision": "fp32", "matmul_precision": "highest"}
    edge = {"fp32": 100.0, "fp32 medium": 124.9, "bf16": 1.0}
    assert fastest([edge])["matmul_precision"] == "highest"


def test_mixed_ranks_take_what_suits_the_slowest() -> None:
    """A laptop with AVX2 and three machines with AMX: in bf16 all would wait minutes for it."""
    assert _precision(FAST, FAST, SLOW, FAST) == "fp32"
    assert _precision(FAST, {"fp32": 50.0, "bf16": 70.0}) == "bf16"
    assert _precision({"fp32": 1.0, "bf16": 8.0, "fp16": 4.0}, {"fp32": 1.0, "fp16": 4.0}) == "fp16"
    assert _precision({"fp32": 1.0, "bf16": 8.0}, {"fp32": 1.0, "fp16": 4.0}) == "fp32"


class Ranks(World):
    """A world in which only this rank exists; the other ranks' texts are given."""

    def gather_text(self, text: str) -> list[str]:
        if "fp32" in json.loads(text):  # this rank's rates
            return [text, json.dumps(SLOW)] if self.rank == 0 else [json.dumps(SLOW)]
        chosen = {"precision": "fp32", "matmul_precision": "highest"}
        return [text, text] if self.rank == 0 else [json.dumps([{}, chosen])]


def test_every_rank_resolves_auto_to_the_same_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_precision, "cpu_rates", lambda: FAST)
    settings = PriorTrain(engine=AUTO, out=tmp_path / "run")
    assert settle_precision(settings, World()).engine.precision == "bf16"
    for rank in (0, 1):
        resolved = settle_precision(settings, Ranks(rank=rank, size=2))
        expected = EngineConfig(precision="fp32", matmul_precision="highest")
        assert resolved == replace(settings, engine=expected)
    given = replace(settings, engine=EngineConfig(precision="bf16", matmul_precision="medium"))
    assert settle_precision(given, World()) is given


def test_a_cpu_is_timed_in_each_precision() -> None:
    names = {"fp32", "bf16", *(["fp32 medium"] if medium_is_accurate() else [])}
    before = torch.get_float32_matmul_precision()
    set_numerics(CPU, "highest")
    assert set(cpu_rates()) == names and min(cpu_rates().values()) > 1e7
    torch.set_float32_matmul_precision(before)


def test_nothing_computes_in_an_unresolved_precision() -> None:
    with pytest.raises(ConfigError, match="must be resolved"):
        Stage([], AUTO, CPU)


def test_plans_resolve_auto_from_the_hardware() -> None:
    tiny = replace(prior_tiny(), engine=AUTO)

    def planned(hardware: Any) -> str:
        return next(iter(layouts(tiny, 2, hardware))).engine.precision

    cpu = KNOWN["cpu"]
    assert planned(replace(cpu, half_flops=2e9, full_flops=140e9)) == "fp32"
    assert planned(replace(cpu, half_flops=400e9, full_flops=140e9)) == "bf16"
    assert planned(KNOWN["h100"]) == "bf16" and planned(KNOWN["v100-16gb"]) == "fp16"


@pytest.mark.seconds
def test_a_resumed_run_keeps_its_precision_and_logs_what_this_machine_would_choose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level(logging.INFO, LOG.name)
    chain = Chain(folder=tmp_path, device=CPU)
    chain.pack()
    chain.train("dvae")
    chain.tokenize()
    monkeypatch.setattr(auto_precision, "cpu_rates", lambda: FAST)
    chain.train("prior", engine=AUTO)
    run = tmp_path / "prior"
    config = json.loads((run / "config.json").read_text())
    model = json.loads((run / "model.json").read_text())
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert config["engine"]["precision"] == "bf16" == row["precision"]
    assert model["facts"]["numerics"]["precision"] == "bf16"
    assert "engine.precision auto: bf16 (a matmul here: fp32" in caplog.text
    monkeypatch.setattr(auto_precision, "cpu_rates", lambda: SLOW)
    for text, engine in (("begun in bf16", AUTO), ("precision bf16, now fp32", EngineConfig())):
        chain.forget("prior", 2)
        caplog.clear()
        chain.train("prior", engine=engine)
        assert text in caplog.text
        kept = json.loads((run / "config.json").read_text())["engine"]["precision"]
        assert kept == ("bf16" if engine is AUTO else "fp32")
    assert engine_numerics(CPU, EngineConfig(precision="bf16")).precision == "bf16"
