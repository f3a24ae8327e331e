"""The suites coco, cub and pairs: FID and IS by blur, as the job of score_job.py."""

from collections.abc import Callable
from dataclasses import fields

from core.errors import InputError
from core.files.atomic import Json
from core.workers import JobWorker
from data_pipeline.evaluation_sets import COCO, CUB
from generation.config import ScoreConfig
from generation.evaluation.open_score import open_job
from generation.evaluation.score_job import ScoreJob
from generation.evaluation.suites.config import FidConfig
from generation.evaluation.suites.protocol import Inputs, Measured
from generation.evaluation.suites.registry import suite_of
from generation.text_to_image import Studio


class FidSuite:
    """Captions with pictures, compared by features."""

    def __init__(self, job: ScoreJob, member: JobWorker) -> None:
        self.prompts, self.facts = job.prompts, job.facts
        self._job, self._member = job, member

    def measure(self, studio: Callable[[], Studio]) -> Measured:
        scores = self._job.run(studio, self._member)
        first = scores["rows"][0]
        label = "proxy " * self._job.proxy
        blur = f" at blur {first['radius']:g}" if first["radius"] else ""
        headline = {f"{label}FID{blur}": first["fid"], f"{label}IS{blur}": first["is"]}
        results = {name: value for name, value in scores.items() if name != "data"}  # has a path
        return Measured(results=results, headline=headline)


def prepare_coco(inputs: Inputs, settings: FidConfig, prompts: list[Json] | None) -> FidSuite:
    """Open MS-COCO. Raises: InputError if DATA is another set, or no longer has the prompts."""
    return _prepare("coco", COCO, inputs, settings, prompts)


def prepare_cub(inputs: Inputs, settings: FidConfig, prompts: list[Json] | None) -> FidSuite:
    """Open CUB. Raises: InputError if DATA is another set, or no longer has the prompts."""
    return _prepare("cub", CUB, inputs, settings, prompts)


def prepare_pairs(inputs: Inputs, settings: FidConfig, prompts: list[Json] | None) -> FidSuite:
    """Open a packed set. Raises: InputError if it is another one, or no longer has the prompts."""
    return _prepare("pairs", "", inputs, settings, prompts)


def _prepare(
    name: str, prefix: str, inputs: Inputs, settings: FidConfig, prompts: list[Json] | None
) -> FidSuite:
    if suite_of(inputs.data) != name:
        raise InputError(
            f"suite {name} reads {prefix or 'a packed set'}{'DIR' if prefix else ''}, not "
            f"{inputs.data}; give --suite {suite_of(inputs.data)}"
        )
    plain = ScoreConfig(**{each.name: getattr(settings, each.name) for each in fields(ScoreConfig)})
    job = open_job(
        inputs.data,
        inputs.models,
        settings.inception,
        settings.overlap,
        plain,
        inputs.out,
        inputs.device,
        inputs.digests,
    )
    if prompts not in (None, job.prompts):
        raise InputError(
            f"{inputs.data} does not choose the prompts of the file: it is another set, or "
            "another version of it"
        )
    return FidSuite(job, inputs.member)
