"""The pictures of one set, by caption: read from files, from a packed set, or drawn by a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from core.config import S3
from core.errors import InputError
from core.files.out_folder import owner_of
from core.log import LOG, progress
from core.storage.store import open_store
from data_pipeline.config import PackConfig
from data_pipeline.formats.raw import RawSource
from data_pipeline.sources.pair import Pair, Unusable
from data_pipeline.sources.plan import GENERATED, open_sources, plan_units
from data_pipeline.sources.units import unit_pairs
from data_pipeline.streaming.stream import first_records
from data_pipeline.text.captions import clean_caption, clean_captions
from generation.config import ModelPaths, SampleConfig
from generation.text_to_image import Arrivals, open_studio
from parallel.mesh import own_mesh
from serving.study.pixels import Encoded, Rgb

MOST = 10_000
"""Pictures of a set that are read, at most."""
_TOGETHER = 256
"""Candidates that are drawn before the best ones are kept and the others dropped."""


def is_run(place: str) -> bool:
    """True for a folder of run folders (prior, dvae, bpe, clip), or a prior's run folder."""
    return not place.startswith(S3) and (
        (Path(place) / "prior").is_dir() or owner_of(Path(place)) == "train prior"
    )


def models_of(place: str) -> ModelPaths:
    """The run folders of a run."""
    prior, folder = Path(place, "prior"), Path(place)
    if not prior.is_dir():
        prior, folder = Path(place), Path(place).absolute().parent
    models = ModelPaths(prior=prior, dvae=folder / "dvae", clip=folder / "clip", bpe=folder / "bpe")
    missing = [str(each) for each in (models.dvae, models.bpe) if not each.is_dir()]
    if missing:
        raise InputError(f"the run {place} needs {' and '.join(missing)} to draw; copy them there")
    return models


def read_set(place: str, most: int = MOST) -> dict[str, Encoded]:
    """Read the first picture of each caption: of what `tapir pack` wrote, or of what it reads.

    Raises: InputError if there are no pairs.
    """
    pictures: dict[str, Encoded] = {}
    for count, (captions, picture) in enumerate(_pairs(place, most)):
        if count == most:
            LOG.warning("%s: only the first %d pictures are read", place, most)
            break
        for caption in captions:
            pictures.setdefault(caption, picture)
    if not pictures:
        raise InputError(f"{place!r} holds no pictures with captions; see docs/data.md")
    return pictures


def _pairs(place: str, most: int) -> Iterator[tuple[Sequence[str], Encoded]]:
    if place in GENERATED:
        raise InputError(f"{place!r} is a generator; pack it, and give the folder of the set")
    if _is_packed(place):
        source = RawSource(open_store(place), "validation")
        for record in first_records(source, most):
            yield record.captions, Encoded(record.image, f"{place}, pair {record.key}")
        return
    sources, config, rejects = open_sources([place]), PackConfig(), list[Unusable]()
    plan = plan_units(sources, config)
    for unit in plan.units:
        rows = plan.listings.get(unit.name, [])
        for pair in unit_pairs(unit, sources[unit.source].files, rows, config):
            if isinstance(pair, Pair):
                yield clean_captions(pair.caption, pair.where), Encoded(pair.image, pair.where)
            else:
                rejects.append(pair)
    if rejects:
        LOG.warning("%s: %d files are left out: %s", place, len(rejects), rejects[0].reason)


def _is_packed(place: str) -> bool:
    if place.startswith(S3):
        return open_store(place).exists("validation/manifest.json")
    return owner_of(Path(place)) == "a data set"


def read_captions(path: Path) -> list[str]:
    """The distinct, cleaned captions of a text file with one a line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read the captions {path}: {error.strerror}") from error
    cleaned = [clean_caption(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line]
    if not cleaned:
        raise InputError(f"{path} holds no captions; write one a line")
    return list(dict.fromkeys(cleaned))


def draw_set(place: str, captions: list[str], config: SampleConfig) -> list[Rgb]:
    """Draw `config.candidates` for each caption and keep the best by CLIP, or the only one.

    Raises: InputError if there are several candidates and no CLIP to rank them.
    """
    models = models_of(place)
    rerank = config.candidates > 1
    if rerank and not models.clip.is_dir():
        raise InputError(
            f"there is no CLIP in {models.clip} that ranks the candidates; give --candidates 1"
        )
    studio = open_studio(
        models,
        config.precision,
        own_mesh(),
        one_row=config.rows(len(captions)) == 1,
        rerank=rerank,
        batch=config.batch,
    )
    studio.tell_cut(captions)
    size, best = max(1, _TOGETHER // config.candidates), list[Rgb]()
    with progress(f"draw {place}", len(captions) * config.candidates) as meter:
        arrivals = Arrivals(meter, None)
        for first in range(0, len(captions), size):
            rows = studio.draw(captions[first : first + size], config.draws, done=arrivals)
            best += [row.pictures[0].copy() for row in rows]
    return best
