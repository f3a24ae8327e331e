"""`tapir study make`: choose captions, read or draw both sets of pictures, write the folder.

Pictures are decoded and stored as PNG without metadata, so that no file name, format or size in
bytes tells raters which set a picture is from.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from core.config import check, to_json
from core.errors import InputError
from core.files.atomic import new_folder, write_atomic
from core.keys import keyed_rng
from core.log import LOG
from data_pipeline.images.crops import encode_png
from serving.study.config import StudyConfig
from serving.study.picture_sets import draw_set, is_run, read_captions, read_set
from serving.study.pixels import Encoded, Rgb, decoded
from serving.study.study import FILE, Set, Study, picture_file
from serving.study.votes import create_votes


def make_study(a: str, b: str, out: Path, config: StudyConfig) -> Study:
    """Write a new study's folder.

    Raises: ConfigError with every problem of the settings; InputError if the sets have no caption
    in common, a picture does not decode, or OUT holds something.
    """
    check(config.problems())
    with new_folder(out) as folder:
        sets = {place: read_set(place) for place in (a, b) if not is_run(place)}
        captions = chosen_captions([a, b], sets, config)
        pictures: dict[Set, list[Rgb]] = {
            "a": _pictures(a, sets, captions, config),
            "b": _pictures(b, sets, captions, config),
        }
        same = sum(map(np.array_equal, *pictures.values()))
        if same:
            LOG.warning("%d of %d captions have the same picture in both sets", same, len(captions))
        _warn_of_sizes(pictures)
        study = _study(a, b, captions, config)
        _write(folder, study, pictures)
    return study


def _warn_of_sizes(pictures: Mapping[Set, list[Rgb]]) -> None:
    """Warn if the sets can be told apart by the sizes of their pictures."""
    differ = [(a, b) for a, b in zip(*pictures.values(), strict=True) if a.shape != b.shape]
    if differ:
        (height, width, _), (other_height, other_width, _) = (each.shape for each in differ[0])
        LOG.warning(
            "%d of %d captions have pictures of two sizes (the first: %d x %d in A, %d x %d in B): "
            "raters may tell the sets apart by that; resize one set",
            len(differ), len(pictures["a"]), width, height, other_width, other_height,
        )  # fmt: skip


def chosen_captions(
    places: list[str], sets: Mapping[str, Mapping[str, Encoded]], config: StudyConfig
) -> list[str]:
    """The captions of the study: of --captions, else those that all sets of pictures have.

    Raises: InputError if there are none, or a set lacks one of --captions.
    """
    if config.captions is not None:
        captions = read_captions(config.captions)
        for place, pictures in sets.items():
            missing = [caption for caption in captions if caption not in pictures]
            if missing:
                raise InputError(
                    f"{place} has no picture for {len(missing)} captions of {config.captions}, "
                    f"for instance {missing[0]!r}"
                )
    elif sets:
        first, *others = sets.values()
        captions = [text for text in first if all(text in other for other in others)]
    else:
        raise InputError("two runs draw any caption: give --captions FILE, with one a line")
    if not captions:
        raise InputError(
            f"{' and '.join(places)} have no caption in common; captions are compared in lower "
            "case, with single spaces"
        )
    count = config.count or len(captions)
    if count > len(captions):
        raise InputError(f"--count {count}: there are {len(captions)} captions; give less")
    draw = keyed_rng(config.draw.seed, "captions").permutation(len(captions))[:count]
    return [captions[int(i)] for i in sorted(draw)]


def shuffled_pixels(picture: Rgb, *key: int) -> Rgb:
    """The same pixels in a random order, so that nothing can be recognised."""
    pixels = picture.reshape(-1, 3)
    order = keyed_rng("catch", *key).permutation(len(pixels))
    return pixels[order].reshape(picture.shape)


def _pictures(
    place: str,
    sets: Mapping[str, Mapping[str, Encoded]],
    captions: list[str],
    config: StudyConfig,
) -> list[Rgb]:
    if place in sets:
        return [decoded(sets[place][caption]) for caption in captions]
    return draw_set(place, captions, config.draw)


def _study(a: str, b: str, captions: list[str], config: StudyConfig) -> Study:
    most = min(config.per_rater or len(captions), len(captions))
    catches = -(-most // config.catch_every) if config.catch_every else 0
    drawn = to_json(config.draw.draws) if is_run(a) or is_run(b) else {}
    return Study(
        a=a,
        b=b,
        captions=tuple(captions),
        catches=tuple(captions[i % len(captions)] for i in range(catches)),
        votes=config.votes,
        per_rater=config.per_rater,
        catch_every=config.catch_every,
        catch_least=config.catch_least,
        seed=config.draw.seed,
        drawn=drawn,
    )


def _write(folder: Path, study: Study, pictures: Mapping[Set, list[Rgb]]) -> None:
    """Write all pictures, those of catch trials alternately from both sets, and the files."""
    for side, rows in pictures.items():
        for trial, picture in enumerate(rows):
            write_atomic(picture_file(folder, trial, side), encode_png(picture))
    count = len(study.captions)
    for i in range(len(study.catches)):
        picture = pictures["a" if i % 2 else "b"][i % count]
        broken = shuffled_pixels(picture, study.seed, i)
        write_atomic(picture_file(folder, count + i, "a"), encode_png(picture))
        write_atomic(picture_file(folder, count + i, "b"), encode_png(broken))
    create_votes(folder, study)
    write_atomic(folder / FILE, study.sealed())
