"""Walk all stages on a user's own pairs, in a given time."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.chain import Resources
from cluster.object_server import ObjectServer, object_server
from core.config import check, from_json
from core.errors import InputError
from core.files.atomic import Json, canonical_json, held, write_atomic
from core.files.out_folder import refuse_others_folder
from core.log import LOG
from core.storage.store import Store, open_store
from data_pipeline.text.bpe import load_tokenizer
from generation.config import DrawSettings
from generation.evaluation.verdict import judge
from generation.shipped import paths_of
from planning.calibration.stage_trial import time_sizes
from training.export.weights import saved_steps
from workflow.chain.here import LocalStage, run_stage, seconds_of, stages_of, typed
from workflow.demo_config import DemoConfig
from workflow.demo_folder import BUCKET, claim, copy_manifests
from workflow.own_pairs import sizes as rules
from workflow.own_pairs.facts import pairs_of
from workflow.own_pairs.pace import Pace
from workflow.own_pairs.sizes import Flags, Pairs, Size, Sizing
from workflow.report.page import write_report
from workflow.report.summary import summarise
from workflow.run_file import FOLDERS, STAGES, RunFile, StageSpec

PLAN = "sizes.json"
TOKEN_WORKERS = 2
MINUTES = 30.0
_TAIL = 0.15
"""Share of the time for drawing, the verdict and the report; on a busy machine it is more."""
_TRAINED = 0.1
"""Share of the time for training steps, at least."""
_STARTS = 5
"""Commands that import torch: the measurement, dvae, tokenize, clip and prior."""
_PACKED = 0.4
"""Share of the time for packing, at most."""
_START_UP = 3.0
"""Seconds to start a training stage, in those of the stage bpe, which does little else."""
_LATE = 1.3
"""A stage that takes this many times its share of the time is stopped; the last one at its share.
"""
_BATCH = 32
"""Pictures of a dVAE's step."""
_MINI_STEPS = {"dvae": 8, "clip": 8, "prior": 16}
_JUDGED = {"tiny": 24, "mini": 4}
"""Held-out captions, at most, that the verdict draws four pictures for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was chosen: kept in sizes.json, so that an interrupted demo goes on with the same."""

    pairs: Pairs
    size: Size
    seconds: dict[str, float]
    """Of a step, by stage."""
    steps: dict[str, int]
    """Of the stages that have begun."""
    stopped: tuple[str, ...] = ()
    """Stages that ran out of time; their newest checkpoints are used."""
    warmup: dict[str, int] = field(default_factory=dict)
    """Of the stages that went on with fewer steps, which keep the warm-up that they began with."""
    drawing: float = 0.0
    """Seconds for the pictures of `tapir evaluate`, and for those of the verdict."""

    @property
    def sizing(self) -> Sizing:
        return Sizing(size=self.size, seconds=self.seconds)


class OwnPairs:
    """The demo of one folder of pairs."""

    def __init__(self, config: DemoConfig, server: ObjectServer) -> None:
        self._config, self._server, self._folder = config, server, config.folder
        self._seconds = 60 * (config.minutes or MINUTES)
        self._began = time.monotonic()
        self._mini = config.size == "mini"
        self._start_up = 0.0
        """Seconds to start a training stage: an estimate, then those of the last one."""
        self.stages: list[LocalStage] = []

    @property
    def left(self) -> float:
        """Seconds for training, until drawing and the verdict begin."""
        return self._seconds - self._spent() - max(_TAIL * self._seconds, 2 * self._start_up)

    def _spent(self) -> float:
        return time.monotonic() - self._began

    def run(self) -> Plan:
        """Run all stages; returns the plan that they followed."""
        self._pack()
        copy_manifests("pack", self._folder, self._server)
        began = time.monotonic()
        self._stage("bpe", {})
        self._start_up = _START_UP * (time.monotonic() - began)
        plan = self._plan()
        plan = self._train("dvae", plan)
        self._stage("tokenize", self._flags(plan))
        copy_manifests("tokens", self._folder, self._server)
        plan = self._train("clip", plan)
        plan = self._for_drawing(self._train("prior", plan))
        self._stage("evaluate", self._flags(plan))
        return plan

    def verdict(self, plan: Plan) -> Json:
        """Say whether the pairs were enough."""
        path = self._folder / "verdict.json"
        if not path.exists():
            most = rules.captions_in(plan.sizing, plan.pairs, plan.drawing)
            most = min(_JUDGED[self._config.size], most)
            draws = DrawSettings(candidates=4, temperature=0.9, seed=self._config.seed)
            models = paths_of(self._folder)
            judge(models, self._store("raw"), self._store("tokens"), self._folder, draws, most)
        body: Json = json.loads(path.read_bytes())
        return body

    def _pack(self) -> None:
        """Pack all pairs. Raises: InputError if they are too many for the time."""
        if not self._stage("pack", {}, _PACKED * self._seconds):
            raise InputError(
                f"packing {self._config.data} takes more than {_PACKED:.0%} of "
                f"{self._seconds / 60:g} minutes: give a folder of fewer pictures, or more "
                "--minutes; the same command goes on"
            )

    def _store(self, name: str) -> Store:
        return open_store(f"s3://{BUCKET}/{name}")

    def _plan(self) -> Plan:
        """Measure steps of growing sizes, and take the largest that fits; or the kept plan."""
        path = self._folder / PLAN
        if path.exists():
            return from_json(Plan, json.loads(path.read_bytes()))
        self._refuse_too_little_time()
        tokenizer, _ = load_tokenizer(self._folder / "bpe")
        with self._server.credentials():  # afterwards no variables of the ranks are left
            pairs = pairs_of(self._store("raw"), tokenizer)
            check(pairs.problems(self._config.data))
            sizes = rules.fitting(pairs)[: 1 if self._mini else None]
            LOG.info("measuring steps of up to %d sizes", len(sizes))
            settings = [rules.settings_of(size, pairs) for size in sizes]
            measured = time_sizes(settings, rules.LEAST, self.left)
        free = self.left - (_STARTS - 1) * self._start_up
        chosen = rules.choose(sizes, pairs, measured, free)
        LOG.info(
            "%d pairs to train on, %d held out: %s; steps of %s",
            *(pairs.train, pairs.held_out, chosen.size.text),
            ", ".join(f"{name} {1e3 * each:.0f} ms" for name, each in chosen.seconds.items()),
        )
        return self._keep(Plan(pairs=pairs, size=chosen.size, seconds=chosen.seconds, steps={}))

    def _keep(self, plan: Plan) -> Plan:
        write_atomic(self._folder / PLAN, canonical_json(asdict(plan)))
        return plan

    def _refuse_too_little_time(self) -> None:
        """Raises: InputError if starting the commands leaves too little time to train."""
        starts = _STARTS * self._start_up
        if self._mini or self.left - starts >= _TRAINED * self._seconds:
            return
        begun = self._spent() + starts
        enough = max(begun / (1 - _TAIL - _TRAINED), (begun + 2 * self._start_up) / (1 - _TRAINED))
        raise InputError(
            f"of {self._seconds / 60:g} minutes, starting the commands alone takes about "
            f"{starts / 60:.1f} on this machine now: end other work, or give --minutes "
            f"{math.ceil(enough / 60)} or more; the same command goes on from here"
        )

    def _train(self, name: str, plan: Plan) -> Plan:
        """Train a stage for its share of the time that is left; a late one is stopped."""
        later = {"dvae": ("clip", "prior"), "clip": ("prior",), "prior": ()}[name]
        seconds = self._share(name, later, plan)
        if name not in plan.steps:
            steps = rules.steps_of(name, plan.pairs, plan.seconds[name], 0.9 * seconds)
            steps = _MINI_STEPS[name] if self._mini else steps
            plan = self._keep(replace(plan, steps={**plan.steps, name: steps}))
        if name in plan.stopped:
            return plan
        limit = max(seconds * (_LATE if later else 1.0), 30.0) + self._start_up
        began, each = time.monotonic(), 0.0
        while True:
            pace = Pace(
                self._folder / name, plan.steps[name], limit, self._start_up, time.monotonic
            )
            finished = self._stage(name, self._flags(plan), *self._bounds(limit, pace))
            each, limit = pace.each or each, pace.left
            self._start_up = self._start_up if pace.start_up is None else pace.start_up
            fewer = None if finished else self._fewer_steps(name, plan, pace)
            if fewer is None:
                break
            plan = self._keep(fewer)
        if not finished:
            plan = self._keep(replace(plan, stopped=(*plan.stopped, name)))
        spent = time.monotonic() - began - self._start_up
        late = (each or spent / plan.steps[name]) / plan.seconds[name]
        if late > 1:  # this machine does other work too: the next stages, and drawing, are shorter
            slower = {n: s * late if n in (name, *later) else s for n, s in plan.seconds.items()}
            plan = self._keep(replace(plan, seconds=slower))
        return plan

    def _share(self, name: str, later: tuple[str, ...], plan: Plan) -> float:
        """Seconds for the steps of a stage, of those that are left."""
        shares = {each: rules.SHARES[each] for each in (name, *later)}
        starts, tokens = 1 + len(later), 0.0
        if name == "dvae":  # the token job comes after it: a forward pass of each pair
            starts, tokens = starts + 1, plan.pairs.train * plan.seconds[name] / _BATCH / 3
        free = self.left - starts * self._start_up - tokens
        return max(free, 1.0) * shares[name] / sum(shares.values())

    def _bounds(self, limit: float, pace: Pace) -> tuple[float, Callable[[], bool] | None]:
        """When a stage is stopped."""
        return (0.0, None) if self._mini else (limit, pace.is_late)

    def _fewer_steps(self, name: str, plan: Plan, pace: Pace) -> Plan | None:
        """As many steps as still fit, so that schedules come to their ends; None if none do."""
        free = pace.left - self._start_up
        if pace.each is None or free <= 0:
            return None
        done = saved_steps(self._folder / name, name) or [0]
        steps = min(done[-1] + int(0.9 * free / pace.each), plan.steps[name])
        if steps <= done[-1]:
            return None
        LOG.info(
            "%s: a step takes %.0f ms on this machine now, not %.0f: it goes on to step %d of %d",
            *(name, 1e3 * pace.each, 1e3 * plan.seconds[name], steps, plan.steps[name]),
        )
        warmup = {name: rules.warmup(plan.steps[name]), **plan.warmup}
        return replace(plan, steps={**plan.steps, name: steps}, warmup=warmup)

    def _for_drawing(self, plan: Plan) -> Plan:
        """The plan with the seconds for drawing, of those that are left."""
        if plan.drawing:
            return plan
        free = self._seconds - self._spent() - self._start_up
        seconds = max(1.0, min(_TAIL * self._seconds, free) / 3)
        return self._keep(replace(plan, drawing=seconds))

    def _flags(self, plan: Plan) -> dict[str, Flags]:
        """Flags of all stages after bpe; stages that have not begun get any steps."""
        steps = {name: plan.steps.get(name, 8) for name in rules.SHARES}
        seed = self._config.seed
        flags = rules.stage_flags(plan.sizing, plan.pairs, steps, seed)
        for name, warmup in plan.warmup.items():
            changes = f"loop.steps={steps[name]},optim.warmup={warmup}"
            flags[name] |= {"optim.warmup": warmup, "resume_with": changes}
        draws = rules.draw_flags(plan.sizing, plan.pairs, plan.drawing, seed)
        return {**flags, "evaluate": {**draws, "prompts": 8} if self._mini else draws}

    def _stage(
        self,
        name: str,
        flags: dict[str, Flags],
        limit: float = 0.0,
        is_late: Callable[[], bool] | None = None,
    ) -> bool:
        run = run_file_of(self._config, flags)
        stage = next(s for s in stages_of(run) if s.name == FOLDERS.get(name, name))
        self.stages.append(stage)
        return run_stage(stage, self._folder, self._server.environment, limit, is_late)


def run_file_of(config: DemoConfig, flags: dict[str, Flags]) -> RunFile:
    """The stages with known flags; first of all, `pack` and `bpe`.

    Sizes follow what was packed: checks of `pack`'s flags against them would be in vain.
    """
    first: dict[str, Flags] = {"pack": rules.PACK, "bpe": {}}
    known = flags or first
    workers = {"tokenize": TOKEN_WORKERS}
    return RunFile(
        name="demo",
        out=config.folder,
        store=f"s3://{BUCKET}",
        stages={
            name: StageSpec(
                source=config.data if name == "pack" else "",
                flags=dict(known[name]),
                resources=Resources(workers=workers.get(name, 1)),
            )
            for name in STAGES
            if name in known
        },
    )


def run_own_pairs(config: DemoConfig) -> Path:
    """Run the demo on the pairs of a folder; finished stages are kept.

    Raises: ConfigError if there are too few pairs; TapirError naming a stage that failed.
    """
    folder, began = config.folder, time.monotonic()
    refuse_others_folder(folder, "demo")
    with held(folder, "demo"), object_server(folder / "store", BUCKET) as server:
        mine = {name: getattr(config, name) for name in ("data", "minutes", "size", "seed")}
        claim(folder, mine, () if (folder / PLAN).exists() else ("minutes",))
        demo = OwnPairs(config, server)
        plan = demo.run()
        with server.credentials():
            verdict = demo.verdict(plan)
    commands, seconds = typed(demo.stages), seconds_of(folder)
    summary: dict[str, Any] = summarise(folder, config.data, plan.size.text, commands, seconds)
    summary |= {"verdict": verdict, "stopped": list(plan.stopped), "fewer": sorted(plan.warmup)}
    write_atomic(folder / "summary.json", canonical_json(summary))
    for text in verdict["findings"]:
        LOG.info("%s", text)
    minutes = (time.monotonic() - began) / 60
    LOG.info("done in %.1f minutes of %g", minutes, config.minutes or MINUTES)
    return write_report(folder)
