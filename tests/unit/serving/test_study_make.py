"""What `tapir study make` reads, draws, chooses and refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import ConfigError, CorruptError, InputError
from data_pipeline.images.crops import encode_png
from generation.config import SampleConfig
from generation.text_to_image import open_studio
from serving.study.config import StudyConfig, StudyServer
from serving.study.make import make_study, shuffled_pixels
from serving.study.picture_sets import is_run, models_of, read_set
from serving.study.pixels import Encoded, decoded
from serving.study.report import write_results
from serving.study.study import picture_file, read_study
from tests.harness import tapir
from tests.support.raters import BLUE, RED, captions_of, write_set
from tests.unit.finished import write_models

CAPTIONS = captions_of(6)


def pixels_of(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(path))


def test_the_captions_in_common_are_compared(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", CAPTIONS, RED)
    b = write_set(tmp_path / "b", ["another caption", *CAPTIONS[3:0:-1]], BLUE)
    made = make_study(str(a), str(b), tmp_path / "study", StudyConfig(catch_every=2))
    assert made.captions == tuple(CAPTIONS[1:4]) and made.catches == tuple(CAPTIONS[1:3])
    assert read_study(tmp_path / "study") == made
    for trial, (left, right) in enumerate(((1, 3), (2, 2), (3, 1))):
        for side, folder, number in (("a", a, left), ("b", b, right)):
            stored = picture_file(tmp_path / "study", trial, side)  # type: ignore[arg-type]
            assert np.array_equal(pixels_of(stored), pixels_of(folder / f"{number:03d}.png"))
    for trial, colour in ((3, BLUE), (4, RED)):
        intact, broken = (
            pixels_of(picture_file(tmp_path / "study", trial, side))  # type: ignore[arg-type]
            for side in ("a", "b")
        )
        assert (intact == colour).all(-1).any(), "from both sets in turn"
        assert not np.array_equal(intact, broken)
        assert sorted(intact.reshape(-1, 3).tolist()) == sorted(broken.reshape(-1, 3).tolist())


def test_captions_are_chosen_by_key(tmp_path: Path) -> None:
    places = [
        str(write_set(tmp_path / name, CAPTIONS, colour))
        for name, colour in (("a", RED), ("b", BLUE))
    ]
    chosen = {}
    for seed in range(3):
        config = StudyConfig(count=3, draw=SampleConfig(seed=seed))
        chosen[seed] = make_study(*places, tmp_path / f"study{seed}", config).captions
        assert len(chosen[seed]) == 3 and set(chosen[seed]) < set(CAPTIONS)
    assert len(set(chosen.values())) > 1
    listed = tmp_path / "captions.txt"
    listed.write_text("\n".join([CAPTIONS[4].upper(), "", CAPTIONS[2], CAPTIONS[2]]))
    made = make_study(*places, tmp_path / "listed", StudyConfig(captions=listed))
    assert made.captions == (CAPTIONS[4], CAPTIONS[2])


def test_a_run_draws_the_captions_of_a_folder(tmp_path: Path) -> None:
    models = write_models(tmp_path / "run", CAPTIONS)
    photos = write_set(tmp_path / "photos", CAPTIONS[:2], RED)
    config = StudyConfig(draw=SampleConfig(candidates=3, seed=5))
    made = make_study(str(tmp_path / "run"), str(photos), tmp_path / "study", config)
    assert made.captions == tuple(CAPTIONS[:2]) and made.drawn["candidates"] == 3
    rows = open_studio(models).draw(CAPTIONS[:2], config.draw.draws)
    for trial, row in enumerate(rows):
        stored = pixels_of(picture_file(tmp_path / "study", trial, "a"))
        assert np.array_equal(stored, row.pictures[0]), "the best-ranked of tapir sample"
    other = write_models(tmp_path / "other", CAPTIONS, seed=1)
    with pytest.raises(InputError, match="give --captions FILE"):
        make_study(str(other.prior), str(tmp_path / "run"), tmp_path / "two", config)
    listed = tmp_path / "captions.txt"
    listed.write_text(CAPTIONS[0])
    two = replace(config, captions=listed)
    assert make_study(str(other.prior), str(models.prior), tmp_path / "two", two).captions == (
        CAPTIONS[0],
    )
    assert is_run(str(models.prior)) and models_of(str(models.prior)) == models


def test_a_packed_set_gives_its_validation_split(raw: Path) -> None:
    pictures = read_set(str(raw), 20)
    assert 1 <= len(pictures) <= 20
    picture = next(iter(pictures.values()))
    assert decoded(picture).shape == (32, 32, 3)


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    large = np.zeros((30, 2048, 3), np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    data = Encoded((tmp_path / "large.png").read_bytes(), "large.png")
    assert decoded(data).shape == (15, 1024, 3)
    assert decoded(data, 4).shape == (1, 4, 3)


def test_shuffled_pixels_depend_on_their_key() -> None:
    picture = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    once = shuffled_pixels(picture, 0, 1)
    assert np.array_equal(once, shuffled_pixels(picture, 0, 1))
    assert not np.array_equal(once, shuffled_pixels(picture, 0, 2))


def test_wrong_input_is_refused_with_its_fix(tmp_path: Path) -> None:
    a = str(write_set(tmp_path / "a", CAPTIONS, RED))
    b = str(write_set(tmp_path / "b", ["something else"], BLUE))
    out, plain = tmp_path / "study", StudyConfig()
    with pytest.raises(InputError, match="no caption in common"):
        make_study(a, b, out, plain)
    with pytest.raises(InputError, match="there are 6 captions"):
        make_study(a, a, out, StudyConfig(count=7))
    with pytest.raises(InputError, match="is a generator"):
        make_study("shapes", a, out, plain)
    with pytest.raises(InputError, match="no source"):
        make_study(str(tmp_path / "nothing"), a, out, plain)
    with pytest.raises(InputError, match="cannot read the captions"):
        make_study(a, a, out, StudyConfig(captions=tmp_path / "none.txt"))
    listed = tmp_path / "captions.txt"
    listed.write_text("a caption of nothing")
    with pytest.raises(InputError, match="has no picture for 1 captions"):
        make_study(a, a, out, StudyConfig(captions=listed))
    (tmp_path / "run" / "prior").mkdir(parents=True)
    with pytest.raises(InputError, match=r"needs .*dvae and .*bpe to draw"):
        make_study(str(tmp_path / "run"), a, out, plain)
    assert not out.exists()
    make_study(a, a, out, plain)
    with pytest.raises(InputError, match="holds something already"):
        make_study(a, a, out, plain)
    with pytest.raises(InputError, match="--without 1"):
        write_results(out, (1,))
    wrong = StudyConfig(votes=0, count=-1, per_rater=-1, catch_every=-1, catch_least=2.0)
    assert len(wrong.problems()) == 5
    with pytest.raises(ConfigError):
        make_study(a, a, out, wrong)
    assert StudyServer(port=70000).problems() and not StudyServer().problems()
    (out / "study.json").write_text("{}")
    with pytest.raises(CorruptError):
        write_results(out)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    assert "give one of make, links, serve, results" in tapir("study", code=2)
    assert "did you mean 'make'?" in tapir("study", "mak", code=2)
    assert "tapir study results DIR" in tapir("study", "--help")
    assert "holds no study" in tapir("study", "serve", str(tmp_path), code=2)
    assert "give --raters N" in tapir("study", "links", str(tmp_path), code=2)


def test_pictures_of_two_sizes_get_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = captions_of(3)
    a, b = (write_set(tmp_path / n, captions, c) for n, c in (("a", RED), ("b", BLUE)))
    make_study(str(a), str(b), tmp_path / "equal", StudyConfig(catch_every=0))
    assert "sizes" not in caplog.text
    (b / "001.png").write_bytes(encode_png(np.zeros((20, 16, 3), np.uint8)))
    make_study(str(a), str(b), tmp_path / "unequal", StudyConfig(catch_every=0))
    assert (
        "1 of 3 captions have pictures of two sizes (the first: 12 x 12 in A, 16 x 20 in B)"
        in caplog.text
    )
