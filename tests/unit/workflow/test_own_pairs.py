"""`tapir demo --data FOLDER`: sizes follow the pairs, the machine and the time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.config import from_json, to_json
from core.errors import ConfigError, InputError
from core.files.atomic import held
from core.storage.store import FolderStore
from data_pipeline.text.bpe import load_tokenizer
from workflow.chain.here import stages_of
from workflow.demo import run_demo
from workflow.demo_config import DemoConfig
from workflow.demo_folder import claim
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
    """A clock that stages move: each takes its steps at a true speed, and logs and saves them."""

    START = 10.0

    def __init__(self, root: Path, slower: float, busy_from: float = 0.0) -> None:
        self.now, self._root, self._slower, self._busy_from = 0.0, root, slower, busy_from
        self.trained: dict[str, list[int]] = {}
        """Stage -> `loop.steps` of each of its commands."""
        self._saved: dict[str, list[int]] = {}

    def monotonic(self) -> float:
        return self.now

    def stage(
        self,
        name: str,
        flags: dict[str, rules.Flags],
        limit: float = 0.0,
        is_late: Callable[[], bool] | None = None,
    ) -> bool:
        until = self.now + (limit or 1e9)
        self.now += self.START
        if name not in SECONDS:
            return True
        run, steps = self._root / name, int(flags[name]["loop.steps"])
        self.trained.setdefault(name, []).append(steps)
        done = max(self._saved.get(name, []), default=0)
        while done < steps and self.now < until and not (is_late is not None and is_late()):
            self.now += SECONDS[name] * (self._slower if self.now >= self._busy_from else 1.0)
            done += 1
            if done % 10 == 0:
                run.mkdir(exist_ok=True)
                with open(run / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({"step": done}) + "\n")
        self._saved.setdefault(name, []).append(done)
        return done == steps

    def saved_steps(self, run: Path, stage: str) -> list[int]:
        return self._saved.get(stage, [])


def _walk(machine: _Machine, root: Path, minutes: float) -> Plan:
    """Train all stages after packing and measuring."""
    pairs = replace(PAIRS, train=5000, held_out=500)
    walk: Any = OwnPairs(DemoConfig(data="x", minutes=minutes, out=root), server=None)  # type: ignore[arg-type]
    walk._stage, walk._start_up = machine.stage, 12.0
    machine.now += 60
    plan = Plan(pairs=pairs, size=SIZES[0], seconds=SECONDS, steps={})
    for name in ("dvae", "tokenize", "clip", "prior"):
        if name == "tokenize":
            machine.stage(name, walk._flags(plan))
        else:
            plan = walk._train(name, plan)
    plan = walk._for_drawing(plan)
    machine.now += machine.START  # of `tapir evaluate`
    ended = machine.now
    assert walk._train("prior", plan).steps == plan.steps, "a resumed stage keeps its steps"
    machine.now = ended
    return plan


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.3, 4.0, 10.0])
@pytest.mark.parametrize("busy_from", [0.0, 900.0])
def test_all_stages_are_finished_in_time_on_a_machine_that_becomes_slower(
    slower: float, busy_from: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = _Machine(tmp_path, slower, busy_from)
    monkeypatch.setattr(demo_module, "time", machine)
    monkeypatch.setattr(demo_module, "saved_steps", machine.saved_steps)
    plan = _walk(machine, tmp_path, 30)
    assert 0.6 * 1800 < machine.now < 0.88 * 1800  # the rest is for drawing and the verdict
    assert plan.stopped == (), "fewer steps, whose schedules come to their ends"
    assert {n: len(each) for n, each in machine.trained.items() if n != "prior"} == {
        n: 2 if n in plan.warmup else 1 for n in ("dvae", "clip")
    }
    assert not plan.warmup if slower <= 1 else plan.warmup or slower < 4
    assert 0 < plan.drawing <= 0.15 * 1800 / 3
    for name, commands in machine.trained.items():
        assert plan.steps[name] == commands[-1] <= commands[0]
    assert plan == from_json(Plan, json.loads((tmp_path / "sizes.json").read_bytes()))


def test_a_stage_that_goes_on_with_fewer_steps_keeps_its_warm_up(tmp_path: Path) -> None:
    plan = Plan(
        pairs=PAIRS,
        size=SIZES[0],
        seconds=SECONDS,
        steps={"prior": 90},
        warmup={"prior": 50},
    )
    walk: Any = OwnPairs(DemoConfig(data="x", out=tmp_path), server=None)  # type: ignore[arg-type]
    flags = walk._flags(plan)
    assert flags["prior"]["resume_with"] == "loop.steps=90,optim.warmup=50"
    run = run_file_of(DemoConfig(data="x", out=Path("runs/x")), flags)
    (command,) = next(s for s in stages_of(run) if s.name == "prior").commands
    assert "--resume-with=loop.steps=90,optim.warmup=50" in command
    assert "--optim.warmup=50" in command and "--loop.steps=90" in command


def test_a_time_in_which_the_commands_hardly_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = _Machine(tmp_path, 1.0)
    monkeypatch.setattr(demo_module, "time", machine)
    for minutes in (3, 30):
        walk: Any = OwnPairs(DemoConfig(data="x", minutes=minutes), server=None)  # type: ignore[arg-type]
        machine.now += 100
        walk._start_up = 60.0
        if minutes == 30:
            walk._refuse_too_little_time()
            continue
        with pytest.raises(InputError, match=r"about 5\.0 on .* --minutes 10 or more") as error:
            walk._refuse_too_little_time()
        enough = int(str(error.value).split("--minutes ")[1].split()[0])
        again: Any = OwnPairs(DemoConfig(data="x", minutes=enough), server=None)  # type: ignore[arg-type]
        machine.now += 100
        again._start_up = 60.0
        again._refuse_too_little_time()


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


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held(out, "demo"), pytest.raises(InputError, match="another demo is working in"):
        run_demo(DemoConfig(data=str(tmp_path), out=out))


def test_minutes_may_change_until_sizes_are_chosen(tmp_path: Path) -> None:
    claim(tmp_path, {"data": "a", "minutes": 3})
    claim(tmp_path, {"data": "a", "minutes": 9}, ("minutes",))
    claim(tmp_path, {"data": "a", "minutes": 9})
    with pytest.raises(InputError, match="another --minutes: 9, not 3"):
        claim(tmp_path, {"data": "a", "minutes": 3})
    with pytest.raises(InputError, match="another --data: a, not b"):
        claim(tmp_path, {"data": "b", "minutes": 3}, ("minutes",))


def test_a_demo_has_a_folder_by_its_pairs() -> None:
    assert DemoConfig().folder == Path("runs/demo")
    assert DemoConfig(data="emoji").folder == Path("runs/demo-emoji")
    assert DemoConfig(data="/home/me/My Stamps/").folder == Path("runs/demo-my-stamps")
    assert DemoConfig(data="x", out=Path("y")).folder == Path("y")
