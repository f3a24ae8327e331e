"""Evaluation sets of captions with pictures: MS-COCO, CUB, or a packed data set.

`coco:DIR` and `cub:DIR` are read in their public layouts:

    DIR/annotations/captions_val2014.json     DIR/val2014/COCO_val2014_*.jpg   (or both of 2017)
    DIR/CUB_200_2011/{images.txt, train_test_split.txt, images/CLASS/IMAGE.jpg}
    DIR/text_c10/CLASS/IMAGE.txt              ten captions, one a line
    DIR/testclasses.txt                       one class a line; then these classes are the test set

CUB's last two may also be in DIR/cvpr2016_cub/, where their archive puts them. Text-to-image models
are compared on the test classes; without testclasses.txt, the test pictures of train_test_split.txt
are used. Any other place is a data set of `tapir pack`, and its validation split is used.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from core.errors import InputError
from core.files.atomic import canonical_json, sha256
from core.keys import key_int
from core.log import LOG
from core.storage.store import Store, open_store
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawRecord, RawRecords, RawSource
from data_pipeline.text.captions import clean_caption, is_odd, is_visible

COCO, CUB = "coco:", "cub:"
PAPER_CAPTIONS = 30_000
"""Number of MS-COCO validation captions that the paper samples."""
_COCO_YEARS = ("2014", "2017")
_CUB_TEXTS = ("", "cvpr2016_cub")


@dataclass(frozen=True, kw_only=True)
class EvaluationCaption:
    """A caption and the pictures that it describes."""

    text: str
    pictures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """The captions and the pictures of an evaluation set."""

    name: str
    """Split and data set, for messages."""
    fingerprint: str
    """Digest of the captions and picture names; for a packed set, of all its bytes."""
    captions: list[EvaluationCaption]
    """Distinct captions."""
    pictures: list[str]
    """Ids of all pictures, in stored order."""
    usual: int
    """Default number of captions for a score; 0 = all."""
    read: Callable[[str], bytes]
    """Reads the encoded picture of an id."""

    def choose(self, count: int, seed: int) -> list[EvaluationCaption]:
        """Sample `count` captions by key, in key order; 0 = the usual number."""
        chosen = sorted(self.captions, key=lambda c: (key_int(seed, c.text, "choose"), c.text))
        return chosen[: count or self.usual or None]

    def pictures_of(self, captions: Iterable[EvaluationCaption]) -> list[str]:
        """Distinct picture ids of these captions, in stored order."""
        ids = {name for caption in captions for name in caption.pictures}
        return [name for name in self.pictures if name in ids]


def open_evaluation(place: str, splits: Sequence[str] = ("validation",)) -> EvaluationSet:
    """Open coco:DIR, cub:DIR or these splits of a packed data set.

    Raises: InputError if a file is missing, naming it.
    """
    if place.startswith(COCO):
        return _coco(Path(place.removeprefix(COCO)))
    if place.startswith(CUB):
        return _cub(Path(place.removeprefix(CUB)))
    return packed_set(open_store(place), splits)


def packed_set(store: Store, splits: Sequence[str]) -> EvaluationSet:
    """The evaluation set of these splits of a packed data set."""
    sources = {split: RawSource(store, split) for split in SPLITS}
    pairs: list[tuple[str, str]] = []
    places: dict[str, tuple[str, int]] = {}
    for split in splits:
        for block in range(len(sources[split].sizes)):
            for record in sources[split].read(block):
                pairs += [(caption, record.key) for caption in record.captions]
                places[record.key] = split, block
    held: dict[tuple[str, int], RawRecords] = {}

    def read(name: str) -> bytes:
        place = places[name]
        if place not in held:
            held.clear()  # pictures are read in stored order: one block of them is enough
            held[place] = sources[place[0]].read(place[1])
        return _named(held[place], name).image

    return EvaluationSet(
        name=f"{' and '.join(splits)} pairs of {store.url}",
        fingerprint=sha256("/".join(s.fingerprint for s in sources.values()).encode()),
        captions=_each_once(pairs),
        pictures=list(places),
        usual=0,
        read=read,
    )


def _named(records: RawRecords, key: str) -> RawRecord:
    return next(record for record in records if record.key == key)


def _each_once(pairs: Iterable[tuple[str, str]]) -> list[EvaluationCaption]:
    """Captions by their texts, from (text, picture) pairs."""
    by_text: dict[str, dict[str, None]] = {}
    for text, picture in pairs:
        by_text.setdefault(text, {})[picture] = None
    return [EvaluationCaption(text=text, pictures=tuple(by_text[text])) for text in sorted(by_text)]


def _from_folder(name: str, pairs: list[tuple[str, str]], root: Path, usual: int) -> EvaluationSet:
    captions = _each_once(pairs)
    pictures = sorted({picture for _, picture in pairs})
    if not captions:
        raise InputError(f"there is no caption for any picture in {root}")
    digest = sha256(canonical_json({c.text: list(c.pictures) for c in captions}))
    missing = [picture for picture in pictures if not (root / picture).is_file()]
    if missing:
        raise InputError(
            f"{root / missing[0]} is missing, {len(missing)} of {len(pictures)} pictures in all; "
            f"unpack all pictures of {name} into {root}"
        )
    return EvaluationSet(
        name=name,
        fingerprint=digest,
        captions=captions,
        pictures=pictures,
        usual=usual,
        read=lambda picture: (root / picture).read_bytes(),
    )


def _coco(folder: Path) -> EvaluationSet:
    """MS-COCO's validation split: of 2014, as in the paper, else of 2017."""
    files = {year: folder / "annotations" / f"captions_val{year}.json" for year in _COCO_YEARS}
    year = next((year for year, path in files.items() if path.is_file()), None)
    if year is None:
        raise InputError(
            f"there is no {files[_COCO_YEARS[0]]}; unpack MS-COCO's annotations_trainval2014 and "
            f"val2014 archives into {folder} (or those of 2017)"
        )
    images = folder / f"val{year}"
    if not images.is_dir():
        raise InputError(f"there is no folder {images}; unpack MS-COCO's val{year} into {folder}")
    body = _json(files[year])
    try:
        names = {row["id"]: _inside(row["file_name"], files[year], 1) for row in body["images"]}
        rows = [(row["caption"], names.get(row["image_id"])) for row in body["annotations"]]
        kept = [(text, name) for text, name in rows if name is not None and is_visible(text)]
        pairs = [(_cleaned(text, f"{name} in {files[year]}"), name) for text, name in kept]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{files[year]} is not a file of MS-COCO's captions ({error!r} in it); unpack it again"
        ) from error
    if len(kept) < len(rows):
        LOG.warning(
            "%d of %d captions of %s are empty or of no picture in it, and are left out",
            *(len(rows) - len(kept), len(rows), files[year]),
        )
    return _from_folder(f"MS-COCO val{year}", pairs, images, PAPER_CAPTIONS)


def _cub(folder: Path) -> EvaluationSet:
    """CUB's test pictures with their captions."""
    root = folder / "CUB_200_2011"
    images = _table(root / "images.txt")
    names = {number: _inside(name, root / "images.txt", 2) for number, name in images.items()}
    places = [folder / place for place in _CUB_TEXTS]
    texts = next((place for place in places if (place / "text_c10").is_dir()), None)
    if texts is None:
        raise InputError(
            f"there is no folder {folder / 'text_c10'}; CUB's captions are the text_c10 of "
            "cvpr2016_cub (Reed et al.), one folder a class, one text file a picture"
        )
    classes = next(
        (p / "testclasses.txt" for p in places if (p / "testclasses.txt").exists()), None
    )
    if classes is not None:
        test_classes = set(_text(classes).split())
        chosen = sorted(name for name in names.values() if name.split("/")[0] in test_classes)
    else:
        training = _table(root / "train_test_split.txt")
        chosen = sorted(name for number, name in names.items() if training.get(number) == "0")
    pairs = []
    for name in chosen:
        path = texts / "text_c10" / PurePosixPath(name).with_suffix(".txt")
        pairs += [
            (_cleaned(line, str(path)), name)
            for line in _text(path).split("\n")
            if is_visible(line)
        ]
    kind = "test classes" if classes is not None else "test pictures"
    return _from_folder(f"CUB {kind}", pairs, root / "images", 0)


def _table(path: Path) -> dict[str, str]:
    """Parse lines of a number and a word."""
    rows = [line.split() for line in _text(path).splitlines() if line.strip()]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise InputError(f"{path} has the line {' '.join(wrong)!r}, not a number and a word")
    return {row[0]: row[1] for row in rows}


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path} is missing; unpack the archive that it belongs to again")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8; unpack it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); unpack it again") from error
    if not isinstance(body, dict):
        raise InputError(f"{path} holds no JSON object; unpack it again")
    return body


def _inside(name: str, where: Path, depth: int) -> str:
    """Check a picture's relative path in an annotation file: `depth` plain names."""
    parts = name.split("/")
    plain = not any(map(is_odd, name)) and "\\" not in name and not {"", ".", ".."} & set(parts)
    if len(parts) != depth or not plain:
        raise InputError(f"{where} names the picture {name!r}, which is outside of its folder")
    return name


def _cleaned(text: str, where: str) -> str:
    return clean_caption(text.encode("utf-8", "surrogatepass"), where)
