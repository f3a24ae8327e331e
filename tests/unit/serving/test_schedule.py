"""The order in which candidates of many requests are decoded, on a real running batch."""

from pathlib import Path

import pytest
import torch

from generation.config import DrawSettings
from generation.sampling.running import Candidate, RunningBatch
from generation.text_to_image import Studio, open_studio
from serving.ranks.messages import Draw
from serving.ranks.pixels import PixelDecoder
from serving.ranks.schedule import Advance, Job, Schedule
from tests.unit.finished import write_models


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder: Path = tmp_path_factory.mktemp("models")
    return open_studio(write_models(folder, ["a red cat"], dropout=0.1))


def job(number: int, candidates: int, guidance: float = 1.0) -> Job:
    draw = Draw(
        job=number,
        caption="a red cat",
        candidates=candidates,
        seed=number,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        guidance=guidance,
        partials=(2,),
    )
    return Job(draw=draw, settings=DrawSettings(guidance=guidance), prompt=None)


def schedule_of(studio: Studio, rows: int) -> Schedule:
    def candidate(each: Job, number: int) -> Candidate:
        text = torch.zeros(studio.sampler.config.text_length, dtype=torch.int64, device="cpu")
        key = (each.draw.seed, each.draw.caption, number)
        return Candidate(text=text, key=key, settings=each.settings)

    return Schedule(RunningBatch(studio.sampler.decoder, rows), candidate)


def finished(schedule: Schedule) -> list[tuple[int, int]]:
    """Requests and candidates in the order in which they finish."""
    order = []
    while not schedule.idle:
        order += [
            (advance.job.draw.job, advance.candidate)
            for advance in schedule.step()
            if advance.progress.finished
        ]
    return order


def test_earlier_requests_are_decoded_first(studio: Studio) -> None:
    schedule = schedule_of(studio, 2)
    for each in (job(1, 3), job(2, 1)):
        schedule.add(each)
    assert (schedule.waiting, schedule.busy_rows) == (4, 0)
    assert finished(schedule) == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert (schedule.waiting, schedule.busy_rows) == (0, 0)


def test_rows_that_become_free_are_taken_at_once(studio: Studio) -> None:
    schedule = schedule_of(studio, 2)
    length = studio.sampler.config.image_length
    for each in (job(1, 1), job(2, 2)):
        schedule.add(each)
    steps = 0
    while not schedule.idle:
        list(schedule.step())
        steps += 1
    assert steps == 2 * length


def test_guidance_is_not_overtaken_and_takes_two_rows(studio: Studio) -> None:
    schedule = schedule_of(studio, 2)
    for each in (job(1, 1), job(2, 1, guidance=2.0), job(3, 1)):
        schedule.add(each)
    list(schedule.step())
    assert (schedule.busy_rows, schedule.waiting) == (1, 2)
    assert finished(schedule) == [(1, 0), (2, 0), (3, 0)]


def test_a_cancelled_request_frees_its_rows(studio: Studio) -> None:
    schedule = schedule_of(studio, 2)
    for each in (job(1, 4), job(2, 1)):
        schedule.add(each)
    list(schedule.step())
    schedule.cancel(1)
    schedule.cancel(1)
    schedule.cancel(7)
    assert (schedule.busy_rows, schedule.waiting) == (0, 1)
    assert finished(schedule) == [(2, 0)]
    schedule.cancel(2)


def test_rows_and_pictures_are_decoded_together(studio: Studio) -> None:
    schedule, decoder = schedule_of(studio, 2), PixelDecoder(studio, patience=3)
    first, second = job(1, 2), job(2, 1)
    for each in (first, second):
        schedule.add(each)
    shown = []
    while not schedule.idle:
        for advance in schedule.step():
            decoder.add(advance)
        shown += decoder.take(schedule.idle)
    assert decoder.take(True) == []
    by_job = [(x.job.draw.job, x.candidate, x.row) for x in shown]
    assert sorted(by_job) == [(1, 0, 0), (1, 0, 2), (1, 1, 0), (1, 1, 2), (2, 0, 0), (2, 0, 2)]
    half = next(x for x in shown if x.row)
    whole = next(x for x in shown if (x.job, x.candidate, x.row) == (half.job, half.candidate, 0))
    columns = studio.sampler.config.grid_columns
    assert torch.equal(half.codes[: 2 * columns], whole.codes[: 2 * columns])
    assert not half.codes[2 * columns :].any() and half.score == 0 and whole.score != 0


def test_pictures_wait_for_each_other_and_no_longer_than_asked(studio: Studio) -> None:
    schedule, decoder = schedule_of(studio, 1), PixelDecoder(studio, patience=3)
    schedule.add(job(1, 1))
    ends: list[Advance] = []
    while not schedule.idle:
        ends += [each for each in schedule.step() if each.progress.finished]
    decoder.add(ends[0])
    taken = [len(decoder.take(False)) for _ in range(4)]
    assert taken == [0, 0, 1, 0]
    decoder.add(ends[0])
    decoder.drop(1)
    assert decoder.take(True) == []
