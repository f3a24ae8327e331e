"""The suites of a run: jobs of `tapir evaluate --suite` beside the stage evaluate."""

import re
from dataclasses import dataclass
from pathlib import Path

from cluster.chain import Job
from core.errors import TapirError
from data_pipeline.sources.plan import GENERATED
from generation.evaluation.suites.record import read_recorded
from generation.evaluation.suites.registry import SUITES, suite_called, suite_of
from workflow.run_file import RunFile

SUITES_FLAG, FOLDER = "suites", "suites"
_MODELS = ("prior", "dvae", "clip", "bpe")


@dataclass(frozen=True, kw_only=True)
class PlannedSuite:
    """One suite of a run file."""

    given: str
    """Name of a suite, or path of a suite.json."""
    name: str
    """Part of its job's name, and its folder."""
    suite: str
    """Name of the suite."""
    chooses: bool
    """True if it chooses its prompts from the data; a suite.json may have its own."""


def suite_jobs(run: RunFile, after: tuple[str, ...]) -> list[Job]:
    """The jobs of all suites, which can run once the jobs `after` are done."""
    models = [f"--{model}={run.folder(model)}" for model in _MODELS]
    jobs = []
    for suite in map(_planned, _given(run)):
        data = [run.raw] if SUITES[suite.suite].data else []
        out = run.out / FOLDER / suite.name
        command = ["evaluate", *data, f"--suite={suite.given}", f"--out={out}", *models]
        jobs.append(
            Job(
                name=f"suite-{suite.name}",
                command=tuple(command),
                after=after,
                resources=run.stages["evaluate"].resources,
            )
        )
    return jobs


def suite_problems(run: RunFile) -> list[str]:
    """Problems of the suites of a run file."""
    where, names, problems = f"stages.evaluate.flags.{SUITES_FLAG}", set[str](), []
    for given in _given(run):
        try:
            suite = _planned(given)
        except TapirError as error:
            problems.append(f"{where}: {error}")
            continue
        known = suite.suite
        if SUITES[known].data and suite_of(f"{known}:") == known:
            problems.append(
                f"{where}: {known} reads {known}:DIR; give it as the stage score, with a source"
            )
        if suite.chooses and (text := _unfit_source(run, known)):
            problems.append(f"{where}: {text}")
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", suite.name) or suite.name in names:
            problems.append(
                f"{where}: {given} has the name {suite.name!r}, which must be lower-case letters, "
                "digits and -, each name once; rename the file"
            )
        names.add(suite.name)
    return problems


def _unfit_source(run: RunFile, name: str) -> str:
    """A suite's problem with the generator whose pictures the run packs; empty if it has none."""
    needed, pack = SUITES[name].source, run.stages.get("pack")
    if not needed or pack is None or pack.source not in {*GENERATED} - {needed}:
        return ""
    return f"{name} reads {SUITES[name].data}, and pack's source is {pack.source}; leave it out"


def _given(run: RunFile) -> list[str]:
    spec = run.stages.get("evaluate")
    given = spec.flags.get(SUITES_FLAG, []) if spec is not None else []
    return [str(each) for each in (given if isinstance(given, list) else [given])]


def _planned(given: str) -> PlannedSuite:
    """A suite as it is given. Raises: TapirError for an unknown one, or a file that is none."""
    if given in SUITES or not given.endswith(".json"):
        suite_called(given)
        return PlannedSuite(given=given, name=given, suite=given, chooses=True)
    recorded = read_recorded(Path(given))
    chooses = recorded.prompts is None
    return PlannedSuite(given=given, name=Path(given).stem, suite=recorded.name, chooses=chooses)
