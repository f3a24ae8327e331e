"""Captions and pictures that are unlike the usual ones, through the raters' and results pages."""

import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from core.errors import InputError
from data_pipeline.images.crops import encode_png
from serving.security import Access
from serving.study.app import study_app
from serving.study.config import StudyConfig
from serving.study.make import make_study
from serving.study.report import write_results
from serving.study.study import picture_file, read_study
from serving.study.votes import Votes
from tests.support.raters import BLUE, RED, write_set

CAPTIONS = {
    "html": "<script>alert(1)</script><img src=x onerror=\"alert(2)\"> & &amp; 'single'",
    "template": "{{ 7 * 7 }} {% raw %} ${x} <%= y %>",
    "right-to-left": "قطة حمراء فوق سجادة زرقاء (cat) 12",
    "emoji": "a \U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f1e9\U0001f1ea, \u2764\ufe0f",
    "long": " ".join(f"word{i}" for i in range(200)),
    "one word": "x" * 900,
    "marks": "e\u0301" * 40 + " z\u0336a\u0321l\u0334",
}


class _Texts(HTMLParser):
    """What a browser shows of the first h1, and every element's name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.captions: list[str] = []
        self.alts: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self._inside = tag == "bdi"
        self.alts += [str(value) for name, value in attrs if name == "alt"]

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.captions.append(data)


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_any_caption_is_shown_as_it_is(caption: str, tmp_path: Path) -> None:
    a, b = (write_set(tmp_path / n, [caption], c) for n, c in (("a", RED), ("b", BLUE)))
    folder = tmp_path / "study"
    study = make_study(str(a), str(b), folder, StudyConfig(catch_every=0, votes=1))
    assert study.captions == (caption,)
    votes = Votes(folder, study)
    ((rater, token),) = votes.add_raters(1)
    app = study_app(folder, study, votes, Access(host="127.0.0.1"))
    client = TestClient(app, base_url="http://127.0.0.1")
    answer = client.get(f"/r/{token}")
    assert answer.status_code == 200
    page = _Texts(answer.text)
    assert page.captions == [caption]
    assert page.names.count("script") == 1 and page.names.count("img") == 2
    votes.add(rater, 0, {"realism": "left", "match": "neither"})
    votes.close()
    write_results(folder)
    results = _Texts((folder / "results.html").read_text())
    assert results.captions == [caption] and "script" not in results.names
    assert results.alts == [f"A: {caption}", f"B: {caption}"]


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (40, 20), RED), "JPEG", exif=exif)


ODD = {
    "cmyk": (encoded(Image.new("CMYK", (30, 20)), "JPEG"), (20, 30)),
    "grey": (encoded(Image.new("L", (30, 20), 7), "JPEG"), (20, 30)),
    "palette": (encoded(Image.new("P", (9, 9)), "PNG", transparency=0), (9, 9)),
    "16 bits": (encoded(Image.new("I;16", (9, 9), 40_000), "PNG"), (9, 9)),
    "alpha": (encoded(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "WEBP"), (9, 9)),
    "turned": (_turned(), (40, 20)),
    "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), (1, 1)),
    "wide": (encoded(Image.new("RGB", (4096, 16)), "PNG"), (4, 1024)),
}
"""A picture, and the height and width that it is shown with."""


@pytest.mark.parametrize("name", ODD)
def test_pictures_of_any_size_and_kind_are_compared(name: str, tmp_path: Path) -> None:
    data, size = ODD[name]
    a = write_set(tmp_path / "a", [name], RED)
    b = write_set(tmp_path / "b", [name], BLUE)
    (b / "000.png").write_bytes(data)
    folder = tmp_path / "study"
    study = make_study(str(a), str(b), folder, StudyConfig(catch_every=1))
    for trial in (0, 1):
        stored = picture_file(folder, trial, "b").read_bytes()
        assert stored.startswith(b"\x89PNG") and b"eXIf" not in stored and b"tEXt" not in stored
        assert np.asarray(Image.open(io.BytesIO(stored))).shape == (*size, 3)
    assert read_study(folder) == study
    write_results(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + b"\0" * 30,
        encode_png(np.zeros((64, 64, 3), np.uint8))[:60],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["empty", "gif", "cut", "svg"],
)
def test_a_picture_that_does_not_decode_is_named(data: bytes, tmp_path: Path) -> None:
    a, b = (write_set(tmp_path / n, ["one", "two"], c) for n, c in (("a", RED), ("b", BLUE)))
    (b / "001.png").write_bytes(data)
    with pytest.raises(InputError, match=r"001"):
        make_study(str(a), str(b), tmp_path / "study", StudyConfig())
    assert not (tmp_path / "study").exists()
    (b / "001.png").unlink()
    (b / "001.txt").unlink()
    assert make_study(str(a), str(b), tmp_path / "study", StudyConfig()).captions == ("one",)
