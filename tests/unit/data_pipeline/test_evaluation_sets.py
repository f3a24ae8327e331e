"""MS-COCO and CUB in their public layouts, and a packed set, as captions with pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import InputError
from data_pipeline.evaluation_sets import open_evaluation
from data_pipeline.formats.manifest import SPLITS
from tests.unit.layouts import picture, write_coco, write_cub


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_in_both_namings(tmp_path: Path, year: str) -> None:
    coco = open_evaluation(f"coco:{write_coco(tmp_path, 5, year)}")
    assert len(coco.captions) == 10 and len(coco.pictures) == 5
    assert coco.pictures[1] == ("COCO_val2014_" if year == "2014" else "") + "000000000007.jpg"
    assert coco.read(coco.pictures[3]) == picture(3)
    second = next(c for c in coco.captions if c.text == "a second 3")
    assert second.pictures == (coco.pictures[3],)
    assert coco.usual == 30_000


def test_of_two_years_the_papers_is_taken(tmp_path: Path) -> None:
    write_coco(write_coco(tmp_path, 3, "2017"), 4, "2014")
    assert len(open_evaluation(f"coco:{tmp_path}").pictures) == 4


def test_captions_are_chosen_by_key_and_pictures_come_once(tmp_path: Path) -> None:
    coco = open_evaluation(f"coco:{write_coco(tmp_path, 20)}")
    chosen = coco.choose(8, 0)
    assert chosen == coco.choose(8, 0) and chosen != coco.choose(8, 1)
    assert chosen == coco.choose(9, 0)[:8] and len({c.text for c in chosen}) == 8
    names = {name for caption in chosen for name in caption.pictures}
    assert coco.pictures_of(chosen) == sorted(names)
    assert len(coco.choose(0, 0)) == 40


def test_cub_by_the_split_of_pictures_and_by_that_of_classes(tmp_path: Path) -> None:
    cub = open_evaluation(f"cub:{write_cub(tmp_path)}")
    assert cub.pictures == [f"{k + 1:03d}.Bird_{k}/Bird_0000_{3 * k}.jpg" for k in range(4)]
    assert cub.read(cub.pictures[2]) == picture(6)
    plain = next(c for c in cub.captions if c.text == "a plain bird")
    assert len(cub.captions) == 4 * 9 + 1 and plain.pictures == tuple(cub.pictures)
    (tmp_path / "testclasses.txt").write_text("002.Bird_1\n004.Bird_3\n")
    classes = open_evaluation(f"cub:{tmp_path}")
    assert {name[:3] for name in classes.pictures} == {"002", "004"}
    assert len(classes.pictures) == 6 and classes.fingerprint != cub.fingerprint
    (tmp_path / "cvpr2016_cub").mkdir()
    for name in ("text_c10", "testclasses.txt"):
        (tmp_path / name).rename(tmp_path / "cvpr2016_cub" / name)
    assert open_evaluation(f"cub:{tmp_path}").fingerprint == classes.fingerprint


def test_a_packed_set(raw: Path) -> None:
    validation, every = open_evaluation(str(raw)), open_evaluation(str(raw), SPLITS)
    assert validation.pictures == every.pictures[-len(validation.pictures) :]
    assert len(every.pictures) == 600 and validation.fingerprint == every.fingerprint
    assert validation.read(validation.pictures[-1])[:4] == b"\x89PNG"
    assert len({validation.read(name) for name in validation.pictures}) == len(validation.pictures)


def _edit(folder: Path, change: Callable[[dict[str, list[dict[str, object]]]], object]) -> None:
    path = folder / "annotations" / "captions_val2014.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/hostname", "..", "a/b.jpg", "a\\b.jpg", "", "a\0.jpg"]
)
def test_paths_of_annotations_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    write_coco(tmp_path, 2)
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    _edit(tmp_path, lambda body: body["images"][1].update(file_name=name))
    with pytest.raises(InputError, match="outside of its folder"):
        open_evaluation(f"coco:{tmp_path}")
    write_cub(tmp_path / "cub")
    lines = tmp_path / "cub" / "CUB_200_2011" / "images.txt"
    lines.write_text(f"1 {name or '/'}\n".replace("a/b.jpg", "../b.jpg"))
    with pytest.raises(InputError, match=r"outside of its folder|a number and a word"):
        open_evaluation(f"cub:{tmp_path / 'cub'}")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no .*captions_val2014.json; unpack MS-COCO's"):
        open_evaluation(f"coco:{tmp_path}")
    write_coco(tmp_path, 3)
    (tmp_path / "val2014" / "COCO_val2014_000000000007.jpg").unlink()
    with pytest.raises(InputError, match=r"val2014/COCO_val2014_000000000007.jpg is missing"):
        open_evaluation(f"coco:{tmp_path}")
    (tmp_path / "val2014").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"no folder .*val2014; unpack"):
        open_evaluation(f"coco:{tmp_path}")


@pytest.mark.parametrize(
    "missing",
    [
        "CUB_200_2011/images.txt",
        "CUB_200_2011/train_test_split.txt",
        "CUB_200_2011/images/002.Bird_1/Bird_0000_3.jpg",
        "text_c10/002.Bird_1/Bird_0000_3.txt",
        "text_c10",
    ],
)
def test_what_is_missing_of_cub_is_named(tmp_path: Path, missing: str) -> None:
    (write_cub(tmp_path) / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=missing):
        open_evaluation(f"cub:{tmp_path}")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"images": [], "annotations": [{}]}', '{"images": 3}']
)
def test_invalid_annotations_are_refused(tmp_path: Path, text: str) -> None:
    write_coco(tmp_path, 2)
    (tmp_path / "annotations" / "captions_val2014.json").write_text(text)
    with pytest.raises(InputError, match=r"captions_val2014\.json"):
        open_evaluation(f"coco:{tmp_path}")
