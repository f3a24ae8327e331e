"""A run as one file: all stages with presets, changes and resources.

name: shapes
out: runs/shapes
store: s3://bucket/shapes
stages:
  pack: {source: shapes, workers: 2, flags: {count: 20000}}
  bpe: {}
  dvae: {flags: {loop.steps: 1800}}
  tokenize: {workers: 4}
  prior: {preset: tiny, nodes: 2, flags: {mesh.data: 4}}
  clip: {}
  overlap: {source: coco:/data/coco, workers: 8}
  score: {source: coco:/data/coco, workers: 8}
  evaluate: {flags: {prompts: 512}}
slurm: {partition: main}
"""

import math
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.chain import Resources, Scheduler
from cluster.kubernetes.config import KubernetesConfig
from cluster.local import LocalConfig
from cluster.slurm.config import SlurmConfig
from core.config import check, folder_problems, from_json, place_problems, wrong_types
from core.errors import InputError, did_you_mean
from core.known_flags import KnownFlags, known_flags
from core.renamed import new_names, renamed, tell_renamed, translated
from data_pipeline.config import PackConfig, TokenizeConfig
from generation.config import EvaluateConfig, OverlapConfig, ScoreConfig
from training.config import BPETrain, ClipTrain, DVAETrain, PriorTrain
from training.presets import PRESETS
from workflow.run_flags import Value

STAGES = ("pack", "bpe", "dvae", "tokenize", "prior", "clip", "overlap", "score", "evaluate")
"""In a valid order of execution."""
AFTER: dict[str, tuple[str, ...]] = {
    "pack": (),
    "bpe": ("pack",),
    "dvae": ("pack",),
    "tokenize": ("bpe", "dvae"),
    "prior": ("tokenize",),
    "clip": ("bpe",),
    "overlap": ("clip",),
    "score": ("prior", "clip", "overlap"),
    "evaluate": ("prior", "clip"),
}
ARRAYS = ("pack", "bpe", "tokenize", "overlap", "score")
"""Stages that any number of workers can share."""
SETTINGS: dict[str, Any] = {
    "pack": PackConfig,
    "bpe": BPETrain,
    "dvae": DVAETrain,
    "tokenize": TokenizeConfig,
    "prior": PriorTrain,
    "clip": ClipTrain,
    "overlap": OverlapConfig,
    "score": ScoreConfig,
    "evaluate": EvaluateConfig,
}
"""Settings of each stage, whose fields are its flags."""
FOLDERS = {"tokenize": "tokens", "score": "scores", "evaluate": "samples"}
"""Folders of stages whose name differs from the stage's."""
_NEEDS = {each.name for each in fields(Resources)}
"""A stage's keys that are resources."""
FILES: dict[str, dict[str, Any]] = {
    "score": {"inception": Path, "overlap": Path},
    "overlap": {"dest": str},
    "evaluate": {"suites": tuple[str, ...]},
}
"""Flags of stages beside their settings; each of evaluate's suites is a job of its own."""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage of a run."""

    preset: str = "tiny"
    """Preset of a training stage."""
    source: str = ""
    """Source of `pack`, `overlap` or `score`."""
    flags: dict[str, Value | list[Value]] = field(default_factory=dict)
    """Changes, as the command's flags without dashes: loop.steps: 100; a list = several values."""
    resources: Resources = field(default_factory=Resources)
    """Resources of its job."""


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A whole run."""

    name: str
    """Lower case; names of jobs begin with it."""
    out: Path
    """Folder of everything but the data; on a cluster all nodes must see it."""
    store: str = ""
    """Store of raw pairs and tokens: s3://bucket/prefix or a folder; by default `data` in out."""
    to: Scheduler = "local"
    """Scheduler, unless --to names another one."""
    python: str = ""
    """Interpreter on the nodes; by default the one that submits, in containers python3."""
    environment: tuple[str, ...] = ()
    """Names of further variables that jobs inherit; they always inherit S3's AWS_ ones."""
    retries: int = 3
    """Failures of a stage without progress (a newer checkpoint, more shards) that are forgiven."""
    stall_hours: float = 24.0
    """Hours that a stage's starts may run without progress."""
    stages: dict[str, StageSpec] = field(default_factory=dict)
    """Stages to run; others must have run before, or not be needed."""
    local: LocalConfig = field(default_factory=LocalConfig)
    """Settings for this machine."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Settings for Slurm."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """Settings for Kubernetes."""

    @property
    def raw(self) -> str:
        return f"{self.data}/raw"

    @property
    def tokens(self) -> str:
        return f"{self.data}/tokens"

    @property
    def data(self) -> str:
        """Store of raw pairs and tokens."""
        return self.store.rstrip("/") or str(self.out / "data")

    def folder(self, stage: str) -> Path:
        """Run folder of a stage."""
        return self.out / FOLDERS.get(stage, stage)

    def problems(self) -> list[str]:
        problems = []
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?", self.name):
            problems.append(
                f"name={self.name!r} must be lower-case letters, digits and -, at most 30, "
                "beginning with a letter: jobs are called by it"
            )
        problems += folder_problems(self.out, "out")
        if re.search(r"[\r\n]", str(self.out)):
            problems.append(f"out={str(self.out)!r} must be without line breaks")
        for variable in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
                problems.append(f"environment: {variable!r} is not the name of a variable")
        problems += place_problems(self.store, "store")
        if not self.stages:
            problems.append(f"stages: name at least one of {', '.join(STAGES)}")
        if self.retries < 0:
            problems.append("retries must not be negative")
        if not 0 < self.stall_hours < math.inf:
            problems.append(f"stall_hours={self.stall_hours} must be a positive number of hours")
        problems += self.local.problems() + self.slurm.problems()
        for name, spec in self.stages.items():
            problems += spec.resources.problems(name)
            if spec.resources.workers > 1 and name not in ARRAYS:
                problems.append(
                    f"stages.{name}: workers are for {', '.join(ARRAYS)}; use nodes and mesh"
                )
            if spec.resources.nodes > 1 and name in ("evaluate", *ARRAYS):
                problems.append(f"stages.{name}: nodes are for training; data jobs have workers")
            if spec.source and name not in ("pack", "overlap", "score"):
                problems.append(f"stages.{name}: a source is for pack, overlap and score")
            fixed = {"out", "dvae", "bpe", "prior", "clip", "worker", "again", "help"}
            for flag in sorted(fixed & set(spec.flags)):
                problems.append(f"stages.{name}.flags: {flag} is the run's to set; leave it out")
            if name in PRESETS and spec.preset not in PRESETS[name]:
                problems.append(
                    f"stages.{name}: there is no preset {spec.preset!r} (known: "
                    f"{', '.join(PRESETS[name])})"
                )
        if "pack" in self.stages and not self.stages["pack"].source:
            problems.append("stages.pack: give a source, e.g. source: shapes")
        if "overlap" in self.stages and not self.stages["overlap"].source:
            problems.append("stages.overlap: give a source, the evaluation set: source: coco:DIR")
        return problems


def read_runfile(path: Path) -> RunFile:
    """Read a run from YAML, or from a Python file that sets `run` to the same mapping.

    Raises: InputError for a file that is neither; ConfigError for unknown or impossible settings.
    """
    try:
        body = _python(path) if path.suffix == ".py" else yaml.load(path.read_text(), _UniqueKeys)
    except FileNotFoundError as error:
        raise InputError(f"there is no run file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise InputError(f"{path} holds no run: expected a mapping of name, out and stages")
    body = {name: item for name, item in body.items() if item is not None}
    body = _with_new_names(body, path)
    stages = body.get("stages", {})
    problems = wrong_types(RunFile, body, "")
    problems += [f"{name}: missing" for name in ("name", "out") if not body.get(name)]
    if isinstance(stages, dict):
        problems += _unknown("stages", stages, STAGES)
        for name in STAGES:
            problems += _stage_problems(name, stages.get(name))
    check(problems)
    specs = {name: _stage(stages[name]) for name in STAGES if name in stages}
    out = Path(body["out"]).expanduser()
    run = from_json(RunFile, {**body, "out": str(out), "stages": {}})
    run = RunFile(**{**vars(run), "stages": specs})
    check(run.problems())
    return run


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set[str]()
        for key, _ in node.value:
            if str(key.value) in names:
                problem = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names.add(str(key.value))
        return node


def _with_new_names(body: dict[str, Any], path: Path) -> dict[str, Any]:
    """The file with old names of fields replaced; logs one line if there are any."""
    pairs: dict[str, str] = {}
    stages = body.get("stages")
    if not isinstance(stages, dict):
        return body
    specs = {}
    for name, stage in stages.items():
        specs[name] = stage
        if isinstance(stage, dict):
            resources, flags = new_names(Resources), stage.get("flags")
            pairs |= {old: new for old, new in resources.items() if old in stage}
            specs[name] = stage = renamed(Resources, stage)
            if isinstance(flags, dict) and name in SETTINGS:
                names = flags_of(name).renamed
                flags = {str(flag).replace("-", "_"): item for flag, item in flags.items()}
                pairs |= {old: new for old, new in names.items() if old in flags}
                stage["flags"] = translated(names, flags)
    tell_renamed(str(path), pairs)
    return {**body, "stages": specs}


def _python(path: Path) -> Any:
    """The variable `run` of a Python file. Raises: InputError if the file raises."""
    try:
        return runpy.run_path(str(path)).get("run")
    except FileNotFoundError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} failed: {type(error).__name__}: {error}") from error


def _stage_problems(name: str, body: Any) -> list[str]:
    """Names and types of a stage's mapping that do not fit; nothing if the stage is not there."""
    where, body = f"stages.{name}", {} if body is None else body
    if not isinstance(body, dict) or not isinstance(body.get("flags") or {}, dict):
        return [f"{where}: expected a mapping, e.g. {{flags: {{loop.steps: 9}}}}"]
    problems = []
    for key, value in (body.get("flags") or {}).items():
        values = value if isinstance(value, list) else [value]
        if not (isinstance(key, str) and all(isinstance(v, str | int | float) for v in values)):
            problems.append(
                f"{where}.flags.{key}: {value!r} must be a text, a number, true or false, or "
                "a list of them"
            )
    known = ["preset", "source", "flags", *sorted(_NEEDS)]
    problems += _unknown(where, body, known)
    asked, rest = _parts({key: body[key] for key in body if key in known})
    return problems + wrong_types(Resources, asked, where) + wrong_types(StageSpec, rest, where)


def _stage(body: dict[str, Any] | None) -> StageSpec:
    asked, rest = _parts(body or {})
    return StageSpec(**rest, resources=from_json(Resources, asked))


def _parts(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stage's resources, and the rest; without empty values."""
    given = {key: item for key, item in body.items() if item is not None}
    asked = {key: item for key, item in given.items() if key in _NEEDS}
    return asked, {key: item for key, item in given.items() if key not in _NEEDS}


def flags_of(stage: str) -> KnownFlags:
    """The flags that a stage may change."""
    known = known_flags(SETTINGS[stage], flat=stage not in PRESETS)
    return replace(known, types={**known.types, **FILES.get(stage, {})})


def _unknown(where: str, body: dict[str, Any], known: Sequence[str]) -> list[str]:
    """One problem for each name that is not known."""
    old = new_names(Resources)
    return [
        f"{where}: unknown {name!r}"
        + (did_you_mean(name, [*known, *old], old) or f" (known: {', '.join(known)})")
        for name in body
        if name not in known
    ]


def settings_of(run: RunFile, to: Scheduler) -> dict[str, Any]:
    """The run file's settings for a scheduler."""
    return dict(vars(getattr(run, to)))
