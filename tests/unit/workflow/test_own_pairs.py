"""`tapir demo --data FOLDER`: sizes follow the pairs, the machine and the time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.config import from_json, to_json
from core.errors import ConfigError
from core.storage.store import FolderStore
from data_pipeline.text.bpe import load_tokenizer
from workflow.chain.here import stages_of
from workflow.demo import run_demo
from workflow.demo_config import DemoConfig
from workflow.own_pairs import demo as demo_module
from workflow.own_pairs import sizes as rules
from workflow.own_pairs.demo import OwnPairs, Plan, run_file_of
from workflow.own_pairs.facts import pairs_of
from workflow.own_pairs.sizes import SIZES, Pairs, Sizing, choose, fitting, replicas, steps_of

PAIRS = Pairs(
    train=720,
    held_out=80,
    side=96,
    text_length=20,
    vocabulary=512,
    decode_seconds=0.002,
    replicas=2,
)
SECONDS = {"dvae": 0.1, "clip": 0.2, "prior": 0.3}


@pytest.mark.parametrize("size", range(len(SIZES)))
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_size_is_a_run_that_the_commands_accept(size: int, ranks: int) -> None:
    pairs = replace(PAIRS, replicas=ranks)
    sizing = Sizing(size=SIZES[size], seconds=SECONDS)
    flags = {
        **rules.stage_flags(sizing, pairs, {"dvae": 900, "clip": 200, "prior": 700}, 3),
        "evaluate": rules.draw_flags(sizing, pairs, 60, 3),
    }
    config = DemoConfig(data="x", out=Path("runs/x"))
    assert [stage.name for stage in stages_of(run_file_of(config, {}))] == ["pack", "bpe"]
    stages = {s.name: s.commands for s in stages_of(run_file_of(config, flags))}
    assert list(stages) == ["dvae", "tokens", "prior", "clip", "samples"]
    assert "--loop.steps=700" in stages["prior"][0] and len(stages["tokens"]) == 2
    assert f"--mesh.data={ranks}" in stages["clip"][0]
    settings = rules.settings_of(SIZES[size], pairs)
    assert [text for each in settings.values() for text in each.problems()] == []


def test_pixels_and_codes_follow_the_pairs() -> None:
    assert [size.pixels for size in fitting(PAIRS)] == [32, 64, 64]
    assert [size.pixels for size in fitting(replace(PAIRS, side=20))] == [32]
    assert [size.codebook for size in fitting(replace(PAIRS, train=10**6, side=999))] == [
        size.codebook for size in SIZES
    ]
    # 100 pairs of 64 codes are 6,400 tokens: 200 for each of 32 codes
    assert fitting(replace(PAIRS, train=100))[0].codebook == 32
    assert fitting(PAIRS)[0].codebook == 64 and fitting(PAIRS)[2].codebook == 512


def test_the_largest_size_is_taken_of_which_enough_steps_fit() -> None:
    sizes, pairs = fitting(PAIRS), replace(PAIRS, decode_seconds=0.0)
    measured = [SECONDS, {n: 3 * s for n, s in SECONDS.items()}]
    least = {n: rules.LEAST[n] * s / rules.SHARES[n] for n, s in SECONDS.items()}
    most = max(least.values())
    assert choose(sizes, pairs, measured, 3.01 * most).size == sizes[1]
    assert choose(sizes, pairs, measured, 2.99 * most).size == sizes[0]
    assert choose(sizes, pairs, measured, 0.1).size == sizes[0]
    slow = choose(sizes, replace(PAIRS, decode_seconds=0.05), measured[:1], 1e9).seconds
    assert slow["dvae"] == pytest.approx(0.1 + 32 * 0.05 / 2) and slow["prior"] == 0.3
    assert slow["clip"] == pytest.approx(0.2 + 128 * 0.05 / 2)


def test_steps_fill_the_time_up_to_a_number_of_epochs() -> None:
    assert steps_of("prior", PAIRS, 0.3, 300) == 1000
    assert steps_of("prior", PAIRS, 0.3, 1e6) == 60 * 720 // 32
    assert steps_of("clip", PAIRS, 0.3, 1e6) == 40 * 720 // 128
    assert steps_of("dvae", PAIRS, 0.3, 0.1) == 8
    assert rules.clip_batch(replace(PAIRS, train=70)) == 64


def test_replicas_are_powers_of_two_of_cores_or_gpus() -> None:
    assert [replicas(cores, 0) for cores in (1, 2, 3, 7, 64)] == [1, 2, 2, 4, 8]
    assert [replicas(64, gpus) for gpus in (1, 3, 8)] == [1, 2, 8]


def test_a_plan_is_read_as_it_was_written() -> None:
    plan = Plan(pairs=PAIRS, size=SIZES[1], seconds=SECONDS, steps={"dvae": 5}, stopped=("dvae",))
    assert from_json(Plan, to_json(plan)) == plan


class _Machine:
    """A clock that stages move: each takes its steps at a true speed, or ends at its limit."""

    def __init__(self, slower: float) -> None:
        self.now, self._slower = 0.0, slower

    def monotonic(self) -> float:
        return self.now

    def stage(self, name: str, flags: dict[str, rules.Flags], limit: float = 0.0) -> bool:
        steps = flags[name].get("loop.steps", 0)
        taken = 10 + int(steps) * SECONDS.get(name, 0.0) * self._slower
        self.now += min(taken, limit or taken)
        return taken <= (limit or taken)


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.3, 4.0])
def test_the_stages_end_in_time_on_a_machine_that_becomes_slower(
    slower: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, pairs = _Machine(slower), replace(PAIRS, train=5000, held_out=500)
    monkeypatch.setattr(demo_module, "time", machine)
    (tmp_path / "seconds.json").write_text('{"bpe": 4.0}')
    config = DemoConfig(data="x", minutes=30, out=tmp_path)
    walk: Any = OwnPairs(config, server=None)  # type: ignore[arg-type]
    walk._stage = machine.stage
    machine.now += 60  # packing, and measuring
    plan = Plan(pairs=pairs, size=SIZES[0], seconds=SECONDS, steps={})
    for name in ("dvae", "tokenize", "clip", "prior"):
        if name == "tokenize":
            machine.stage(name, walk._flags(plan))
        else:
            plan = walk._train(name, plan)
    assert 0.6 * 1800 < machine.now < 0.86 * 1800  # the rest is for drawing and the verdict
    assert plan == from_json(Plan, json.loads((tmp_path / "sizes.json").read_bytes()))
    assert plan.stopped == (("dvae", "clip", "prior") if slower == 4.0 else ())
    kept = {**plan.steps}
    assert walk._train("prior", plan).steps == kept, "a resumed stage keeps its steps"


def test_facts_of_packed_pairs(raw: Path, bpe: Path) -> None:
    tokenizer, _ = load_tokenizer(bpe)
    pairs = pairs_of(FolderStore(raw), tokenizer)
    assert pairs.train + pairs.held_out == 600 and pairs.side == 32
    assert 8 <= pairs.text_length <= 24 and 0 < pairs.decode_seconds < 1
    assert pairs.problems("x") == []
    few = replace(pairs, train=60).problems("stamps")
    assert len(few) == 1 and "stamps has" in few[0] and "120 at least" in few[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": "no-such-folder"}, "neither one of shapes, emoji"),
        ({"data": ".", "minutes": 1.0}, "at least 3"),
        ({"minutes": 30.0}, "fixed sizes"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_demo(replace(DemoConfig(), **changes))  # type: ignore[arg-type]


def test_a_demo_has_a_folder_by_its_pairs() -> None:
    assert DemoConfig().folder == Path("runs/demo")
    assert DemoConfig(data="emoji").folder == Path("runs/demo-emoji")
    assert DemoConfig(data="/home/me/My Stamps/").folder == Path("runs/demo-my-stamps")
    assert DemoConfig(data="x", out=Path("y")).folder == Path("y")
