"""`tapir evaluate --suite`: one suite from its prompts to suite.json."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.launcher import call_target
from core.config import check, to_json
from core.errors import CorruptError, InputError, TapirError
from core.files.atomic import Json, canonical_json, write_atomic
from core.files.out_folder import refuse_others_folder
from core.log import LOG
from core.storage.store import FolderStore
from core.workers import JobWorker, job_worker_of
from generation.config import ModelPaths, SampleConfig
from generation.evaluation.open_score import digests
from generation.evaluation.suites.protocol import Inputs, Measured, Prepared
from generation.evaluation.suites.record import (
    ASKED,
    FILE,
    FORMAT,
    REQUEST,
    Recorded,
    differences,
    other_software,
    prompt_problems,
    settings_json,
    unrecorded,
    versions,
)
from generation.evaluation.suites.registry import Suite, suite_called
from generation.text_to_image import open_studio
from parallel.mesh import own_mesh
from parallel.precision import set_numerics

_JUDGE_FLAGS = {
    "facts.network": "--inception",
    "facts.overlap": "--overlap",
    "facts.judge_digest": "--judge",
}
"""Facts that a file given by its path decides."""


def run_suite(
    name: str,
    data: str,
    models: ModelPaths,
    settings: SampleConfig,
    out: Path,
    worker: str = "",
    recorded: Recorded | None = None,
) -> Json:
    """Measure a suite and write OUT/suite.json; returns its content.

    `recorded`: a file to repeat, whose prompts are used, and with whose figures these are compared.
    Raises: ConfigError with every problem of the settings; InputError for data that are missing or
    do not fit, or if OUT is another's folder; TapirError if the figures of a file are not repeated.
    """
    suite = suite_called(name)
    _check(name, suite, data, settings, out, recorded)
    refuse_others_folder(out, "score" if suite.workers else "evaluate --suite")
    member = _member(name, suite, worker)
    mesh = own_mesh(member.number)
    device = mesh.world.device
    numerics = set_numerics(device, deterministic=False)  # as `open_studio` does
    inputs = Inputs(
        data=data,
        models=models,
        digests=digests(models, suite.ranks),
        out=out,
        device=device,
        member=member,
    )
    prompts = recorded.prompts if recorded else None
    prepared: Prepared = call_target(suite.prepare, inputs, settings, prompts)
    check(suite.problems(prepared.prompts))
    body = _request(name, suite, inputs, prepared, settings, to_json(numerics))
    if recorded is not None:
        _tell_differences(recorded, body, settings)
    if not suite.workers:  # such a job checks its folder itself
        _claim(out, body, suite)
    opened: Callable[[], Any] = functools.cache(
        functools.partial(
            open_studio,
            *(models, settings.precision, mesh),
            rerank=suite.ranks,
            batch=settings.batch,
        )
    )
    measured = prepared.measure(opened)
    return _finished(body, measured, out / FILE, recorded)


def _check(
    name: str,
    suite: Suite,
    data: str,
    settings: SampleConfig,
    out: Path,
    recorded: Recorded | None,
) -> None:
    if recorded is not None and (out / FILE).resolve() == recorded.path.resolve():
        raise InputError(
            f"{recorded.path} would be replaced by the figures that are compared with it; give "
            "another --out"
        )
    of_prompts = prompt_problems(recorded, settings) if recorded else []
    check(settings.problems() + of_prompts + _data_problems(name, suite, data, recorded))


def _request(
    name: str,
    suite: Suite,
    inputs: Inputs,
    prepared: Prepared,
    settings: SampleConfig,
    numerics: Json,
) -> Json:
    """All of suite.json but its figures."""
    return {
        "format": FORMAT,
        "suite": name,
        "keys": suite.keys,
        "models": inputs.digests,
        "facts": prepared.facts,
        "settings": settings_json(settings),
        "prompts": prepared.prompts,
        "versions": versions(),
        "numerics": numerics,
    }


def _member(name: str, suite: Suite, worker: str) -> JobWorker:
    """This process among the workers. Raises: InputError for several, if the suite has none."""
    member = job_worker_of(worker)
    if member.count > 1 and not suite.workers:
        raise InputError(f"suite {name} is not shared by workers; start one, without --worker")
    return member


def _finished(body: Json, measured: Measured, path: Path, recorded: Recorded | None) -> Json:
    """Write the file with its figures, and compare them with those of a file to repeat."""
    headline = [{"name": name, "value": value} for name, value in measured.headline.items()]
    whole = canonical_json({**body, "results": measured.results, "headline": headline})
    write_atomic(path, whole)
    written: Json = json.loads(whole)
    if recorded is not None:
        _compare(recorded, written, path)
    return written


def _data_problems(name: str, suite: Suite, data: str, recorded: Recorded | None) -> list[str]:
    chosen = recorded is not None and recorded.prompts is not None
    if not suite.data:
        return [f"suite {name} reads no data set; leave {data} out"] if data else []
    if data or (chosen and suite.repeats_without_data):
        return []
    return [f"suite {name} needs DATA: tapir evaluate DATA --suite {name}, DATA is {suite.data}"]


def _tell_differences(recorded: Recorded, body: Json, settings: SampleConfig) -> None:
    """Warn, before anything is drawn, of what differs from a file with figures.

    Raises: InputError if the judge differs and is given by a path, which no file holds.
    """
    if "results" not in recorded.body:
        return
    names = differences(recorded.body, body)
    if wrong := [text for name in names if (text := _wrong_judge(name, recorded, body, settings))]:
        raise InputError("; ".join(wrong))
    if names:
        LOG.warning(
            "this is not the evaluation of %s: it has other %s", recorded.path, ", ".join(names)
        )


def _wrong_judge(name: str, recorded: Recorded, body: Json, settings: SampleConfig) -> str:
    """A judge that differs, and its flag; empty if it is the CLIP among the models."""
    flag = _JUDGE_FLAGS.get(name, "")
    if not flag:
        return ""
    given = getattr(settings, flag.removeprefix("--")) is not None
    key, clip = name.removeprefix("facts."), recorded.body.get("models", {}).get("clip")
    earlier, now = recorded.body["facts"][key], body["facts"].get(key, "none")
    ranked = bool(clip) and str(clip) in str(earlier)
    if ranked and not given:
        return ""
    fix = f"leave {flag} out" if ranked else f"give {flag} as then"
    return f"{recorded.path} has the {key} {earlier}, now it is {now}: {fix}"


def _claim(out: Path, body: Json, suite: Suite) -> None:
    """Store the request in OUT, or check that OUT holds the same one, which is measured again.

    Raises: InputError if it holds another one.
    """
    asked = {name: body[name] for name in ("format", *ASKED)}
    FolderStore(out).put(REQUEST, canonical_json(asked), if_absent=True)
    for name in (REQUEST, FILE):
        _refuse_another(out / name, body, {f"settings.{each}" for each in suite.averages})


def _refuse_another(path: Path, body: Json, free: set[str]) -> None:
    if not path.exists():
        return
    try:
        names = [n for n in differences(json.loads(path.read_bytes()), body) if n not in free]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"{path} is damaged: {error}; delete it") from error
    if names:
        raise InputError(
            f"{path} has other {', '.join(names[:5])}: it is another evaluation; give another --out"
        )


def _compare(recorded: Recorded, now: Json, path: Path) -> None:
    """Log whether the figures of a file are repeated.

    Raises: TapirError if they should be, and are not.
    """
    earlier = recorded.body
    if "results" not in earlier:
        return
    if differences(earlier, now):
        return
    if earlier["results"] == now["results"]:
        LOG.info("%s repeats the figures of %s", path, recorded.path)
    elif names := other_software(earlier, now):
        LOG.warning(
            "%s has other figures than %s, with other %s; install those versions to repeat them",
            *(path, recorded.path, ", ".join(names)),
        )
    elif names := unrecorded(earlier, now):
        LOG.warning(
            "%s has other figures than %s, which does not say its %s: it may be another evaluation",
            *(path, recorded.path, ", ".join(names)),
        )
    else:
        raise TapirError(
            f"{path} does not repeat the figures of {recorded.path}, with the same models, "
            "prompts, settings and versions; compare the two files, and report this"
        )
