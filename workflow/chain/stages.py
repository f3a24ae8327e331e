"""Turn a run file into a chain of jobs, and check its settings before anything is submitted."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.chain import Chain, Job, Scheduler
from core.config import check
from core.flags import parse_over
from core.gpus import usable_gpus
from training.config import StageConfig
from training.presets import PRESETS
from training.run.resume_with import with_changes
from workflow.chain.requirements import chain_problems
from workflow.chain.suites import SUITES_FLAG, suite_jobs, suite_problems
from workflow.run_file import AFTER, ARRAYS, FILES, SETTINGS, RunFile, StageSpec, flags_of
from workflow.run_flags import arguments_of, flag_problems, parsed

AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
AWS_REGION = ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE")


def chain_of(run: RunFile, to: Scheduler) -> Chain:
    """The jobs of a run on a scheduler, each with the command that a user could type.

    Raises: ConfigError with every problem of the stages' settings.
    """
    settings = settings_of_stages(run)
    problems = []
    for name, stage in settings.items():
        gpus = usable_gpus() if to == "local" else run.stages[name].resources.gpus
        texts = stage.problems()
        texts += stage.gpu_problems() if gpus and isinstance(stage, StageConfig) else []
        problems += [f"stages.{name}: {text}" for text in texts]
        problems += _rank_problems(run, name, _ranks(name, stage))
    check(problems + chain_problems(run, settings, to) + suite_problems(run))
    jobs = [_job(run, name, stage) for name, stage in settings.items()]
    if "evaluate" in run.stages:
        report = ("report", str(run.out))
        before = tuple(name for name in ("score", "evaluate") if name in run.stages)
        suites = suite_jobs(run, next(job.after for job in jobs if job.name == "evaluate"))
        names = tuple(job.name for job in suites)
        jobs += [*suites, Job(name="report", command=report, after=before + names)]
    return Chain(
        name=run.name,
        out=run.out.absolute(),
        folder=Path.cwd(),
        python=run.python or ("python3" if to == "kubernetes" else sys.executable),
        environment=tuple(sorted({*run.environment, *AWS, *AWS_REGION})),
        retries=run.retries,
        stall_hours=run.stall_hours,
        jobs=tuple(jobs),
    )


def settings_of_stages(run: RunFile) -> dict[str, Any]:
    """The settings of each stage's command. Raises: ConfigError with every wrong flag."""
    settings, problems = dict[str, Any](), list[str]()
    for name in run.stages:
        stage, texts = _settings(run, name)
        settings[name], problems = stage, problems + texts
    if problems:  # of stages without any, those of their settings are named too
        known = {name: stage for name, stage in settings.items() if stage is not None}
        problems += [f"stages.{n}: {text}" for n, each in known.items() for text in each.problems()]
    check(problems)
    return settings


def _settings(run: RunFile, name: str) -> tuple[Any, list[str]]:
    """A stage's settings, or the problems of its flags."""
    spec, known, where = run.stages[name], flags_of(name), f"stages.{name}.flags"
    default, places, verb = SETTINGS[name](), list[str](), name
    if name in PRESETS:
        default, places = PRESETS[name][spec.preset](), _places(run, name)
        verb = f"train {name} {spec.preset}"
    wrong = flag_problems(where, known, spec.flags, verb)

    def parse(arguments: list[str]) -> Any:
        return parse_over(default, [*places, *arguments], verb, flat=name not in PRESETS)

    left_out = wrong.keys() | FILES.get(name, {}).keys()
    flags = {key: value for key, value in spec.flags.items() if key not in left_out}
    settings, problems = parsed(where, known, flags, parse)
    if problems := [*wrong.values(), *problems]:
        return None, problems
    return with_changes(settings) if isinstance(settings, StageConfig) else settings, []


def missing_variables(chain: Chain) -> list[str]:
    """Environment variables that the run file names and this process lacks."""
    return [n for n in chain.environment if n not in (*AWS, *AWS_REGION) and n not in os.environ]


def _job(run: RunFile, name: str, settings: Any) -> Job:
    spec, world = run.stages[name], _ranks(name, settings)
    make: dict[str, Callable[[RunFile, str, StageSpec], list[str]]] = {
        "pack": _pack,
        "tokenize": _tokenize,
        "overlap": _overlap,
        "score": _draw,
        "evaluate": _draw,
    }
    known = [stage for stage in AFTER[name] if stage in run.stages]
    for stage in AFTER[name]:
        if stage not in run.stages:
            known += [n for n in AFTER[stage] if n in run.stages]
    return Job(
        name=name,
        command=tuple(make.get(name, _train)(run, name, spec)),
        after=tuple(dict.fromkeys(known)),
        ranks=max(1, world // spec.resources.nodes),
        array=name in ARRAYS and spec.resources.workers > 1,
        trains=_trains(name),
        checkpoints=_checkpoints(settings) if _trains(name) else "",
        shards=_output(run, name),
        resources=spec.resources,
    )


def _trains(name: str) -> bool:
    """True for stages that a mesh of ranks trains."""
    return name in PRESETS and name != "bpe"


def _checkpoints(settings: Any) -> str:
    return str(settings.checkpoint.to or settings.out / "checkpoints")


def _output(run: RunFile, name: str) -> str:
    """Place of the files that a data job keeps when it is started again."""
    places = {"pack": run.raw, "tokenize": run.tokens}
    return places.get(name, str(run.folder(name)) if name in ARRAYS else "")


def _ranks(name: str, settings: Any) -> int:
    return int(settings.mesh.world) if _trains(name) else 1


def _rank_problems(run: RunFile, name: str, world: int) -> list[str]:
    """Problems of distributing a stage's ranks over its nodes and their GPUs."""
    resources = run.stages[name].resources
    nodes, gpus = resources.nodes, resources.gpus
    if world % nodes:
        return [
            f"stages.{name}: {world} ranks of its mesh cannot be dealt to {nodes} nodes; change "
            "nodes or flags mesh.*"
        ]
    if gpus and _trains(name) and world // nodes > gpus:
        return [
            f"stages.{name}: {world // nodes} ranks a node have only {gpus} GPUs, and each needs "
            f"one; give nodes: {-(-world // gpus)}, or change gpus or flags mesh.*"
        ]
    return []


def _pack(run: RunFile, name: str, spec: StageSpec) -> list[str]:
    return ["pack", spec.source, run.raw, *arguments_of(spec.flags)]


def _tokenize(run: RunFile, name: str, spec: StageSpec) -> list[str]:
    models = [f"--{model}={run.folder(model)}" for model in ("dvae", "bpe")]
    return ["tokenize", run.raw, run.tokens, *models, *arguments_of(spec.flags)]


def _train(run: RunFile, name: str, spec: StageSpec) -> list[str]:
    return ["train", name, spec.preset, *_places(run, name), *arguments_of(spec.flags)]


def _places(run: RunFile, name: str) -> list[str]:
    """Flags of a training stage that the run sets."""
    data = run.tokens if name == "prior" else run.raw
    bpe = [f"--bpe={run.folder('bpe')}"] if name in ("clip", "prior") else []
    return [f"--data={data}", f"--out={run.folder(name)}", *bpe]


def _overlap(run: RunFile, name: str, spec: StageSpec) -> list[str]:
    places = [f"--clip={run.folder('clip')}", f"--out={run.folder(name)}"]
    return [name, run.raw, spec.source, *places, *arguments_of(spec.flags)]


def _draw(run: RunFile, name: str, spec: StageSpec) -> list[str]:
    """Command of `score` and `evaluate`: the data, the output folder, and the models."""
    models = [f"--{model}={run.folder(model)}" for model in ("prior", "dvae", "clip", "bpe")]
    other = run.stages.get("overlap")
    both = name == "score" and other is not None and other.source == spec.source
    if both and "overlap" not in spec.flags:  # of the same evaluation set
        models.append(f"--overlap={run.folder('overlap') / 'overlap.json'}")
    return [
        name,
        spec.source or run.raw,
        f"--out={run.folder(name)}",
        *models,
        *arguments_of({key: value for key, value in spec.flags.items() if key != SUITES_FLAG}),
    ]
