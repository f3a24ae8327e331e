"""`tapir evaluate --suite`: one file, the same bytes on any batch size; wrong input is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cli.evaluate import evaluate, score, suite_flag
from core.errors import ConfigError, CorruptError, InputError, TapirError
from core.files.out_folder import owner_of, refuse_others_folder
from core.storage.store import open_store
from data_pipeline.config import PackConfig
from data_pipeline.evaluation_sets import open_evaluation
from data_pipeline.images.crops import square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.packing.pack import pack
from generation.config import DrawSettings, ModelPaths
from generation.evaluation.open_score import open_network
from generation.evaluation.suites.panels import PanelsSuite
from generation.evaluation.suites.record import FILE, REQUEST
from generation.evaluation.suites.registry import SUITES
from generation.ranking import WEIGHTS, open_ranker
from generation.text_to_image import Studio, open_studio
from models.critics.fid import Moments, frechet_distance
from parallel.device import CPU
from tests.unit import finished
from tests.unit.finished import write_models, write_open_clip
from tests.unit.layouts import write_coco, write_cub

pytestmark = pytest.mark.seconds

FLAGS = {
    "shapes": ["--prompts", "9", "--candidates", "4"],
    "geneval-style": ["--per-task", "3", "--candidates", "2"],
    "clipscore": ["--captions", "7", "--candidates", "3"],
    "coco": ["--captions", "9", "--candidates", "2", "--block", "4", "--radii", "0", "2"],
    "cub": ["--candidates", "2", "--radii", "0"],
    "pairs": ["--captions", "9", "--candidates", "2", "--radii", "0"],
    "best-of-n": ["--captions", "5", "--candidates", "8", "--repeats", "3"],
    "panels": ["--per-operation", "2", "--candidates", "2"],
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Models, and the data of each suite."""

    folder: Path
    models: ModelPaths
    raw: Path

    @property
    def flags(self) -> list[str]:
        names = ("prior", "dvae", "clip", "bpe")
        return [f"--{name}={getattr(self.models, name)}" for name in names]

    def data(self, suite: str) -> list[str]:
        sets = {"coco": f"coco:{self.folder / 'coco'}", "cub": f"cub:{self.folder / 'cub'}"}
        sets |= {"panels": str(self.folder / "panels")}
        return [sets.get(suite, str(self.raw))] if SUITES[suite].data else []

    def run(self, suite: str, out: Path, *flags: str) -> bytes:
        arguments = [*self.data(suite), "--suite", suite, f"--out={out}", *self.flags]
        evaluate([*arguments, *FLAGS[suite], *flags])
        return (out / FILE).read_bytes()

    def measured(self, suite: str) -> Path:
        """The folder of a suite, which its first reader measures."""
        out = self.folder / "measured" / suite
        if not (out / FILE).exists():
            self.run(suite, out)
        return out

    def again(self, given: Path, out: Path, *flags: str) -> dict[str, Any]:
        evaluate([f"--suite={given}", f"--out={out}", *self.flags, *flags])
        return dict(json.loads((out / FILE).read_bytes()))


@pytest.fixture(scope="module")
def place(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("suites")
    write_coco(folder / "coco", 8)
    write_cub(folder / "cub")
    config = PackConfig(count=200, pixels=16, validation=0.3)
    pack(["panels"], open_store(str(folder / "panels")), config)
    captions = [caption.text for caption in open_evaluation(str(raw)).captions]
    return Place(folder=folder, models=write_models(folder, captions), raw=raw)


@pytest.fixture(scope="module")
def shapes(place: Place) -> Path:
    """suite.json of the suite shapes."""
    return place.measured("shapes") / FILE


@pytest.mark.parametrize("suite", SUITES)
def test_other_batch_sizes_write_the_same_bytes(suite: str, place: Place, tmp_path: Path) -> None:
    first = (place.measured(suite) / FILE).read_bytes()
    assert place.run(suite, tmp_path, "--batch", "3") == first
    body = json.loads(first)
    assert body["suite"] == suite and body["results"] and body["headline"]
    ranked = {"clip"} if SUITES[suite].ranks else set()
    assert set(body["models"]) == {"prior", "dvae", "tokenizer"} | ranked
    assert body["versions"]["torch"] == torch.__version__ and "batch" not in body["settings"]
    assert body["settings"]["seed"] == 0 and all(row["caption"] for row in body["prompts"])
    assert str(place.folder) not in first.decode() and str(tmp_path) not in first.decode()


@pytest.mark.parametrize("suite", ["geneval-style", "panels"])
def test_a_suite_that_ranks_nothing_needs_no_clip(suite: str, place: Place, tmp_path: Path) -> None:
    first = (place.measured(suite) / FILE).read_bytes()
    assert place.run(suite, tmp_path, f"--clip={tmp_path / 'nowhere'}") == first


def test_score_is_an_alias(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (place.measured("coco") / FILE).read_bytes()
    score([*place.data("coco"), f"--out={tmp_path / 'score'}", *place.flags, *FLAGS["coco"]])
    assert (tmp_path / "score" / FILE).read_bytes() == first
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores == json.loads((tmp_path / "score" / "scores.json").read_bytes())
    results = json.loads(first)["results"]
    assert {**results, "data": "MS-COCO val2014"} == scores


def test_a_file_is_repeated_without_its_data(
    place: Place, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    place.again(shapes, tmp_path / "again", "--batch=2")
    assert (tmp_path / "again" / FILE).read_bytes() == shapes.read_bytes()
    assert "repeats the figures of" in caplog.text
    warm = place.again(shapes, tmp_path / "warm", "--temperature=0.5")
    assert warm["settings"]["temperature"] == 0.5
    assert "is not the evaluation of" in caplog.text and "other settings.temp" in caplog.text
    assert warm["prompts"] == json.loads(shapes.read_bytes())["prompts"]


def test_a_file_is_not_replaced_by_what_is_compared_with_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = place.run("geneval-style", Path("runs/suites/geneval-style"))
    given = Path("runs/suites/geneval-style", FILE)
    body = json.loads(first)
    body["results"]["overall"] += 0.5
    given.write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"would be replaced .* give another --out"):
        evaluate([f"--suite={given}", *place.flags])
    assert json.loads(given.read_bytes()) == body
    place.run("geneval-style", Path("other"))  # a suite's name measures again where it is


def test_another_judge_is_an_error_before_anything_is_drawn(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = f"--judge={write_open_clip(tmp_path / 'judge')}"
    judged = json.loads(place.run("clipscore", tmp_path / "judged", judge))
    with pytest.raises(InputError, match=r"judge_digest .*give --judge as then"):
        place.again(tmp_path / "judged" / FILE, tmp_path / "one")
    place.run("clipscore", tmp_path / "proxy")
    with pytest.raises(InputError, match="leave --judge out"):
        place.again(tmp_path / "proxy" / FILE, tmp_path / "one", judge)
    assert not (tmp_path / "one").exists()
    again = place.again(tmp_path / "judged" / FILE, tmp_path / "one", judge)
    assert again == judged
    body = json.loads((tmp_path / "proxy" / FILE).read_bytes())
    body["facts"]["judge_digest"] = body["models"]["clip"] = "another CLIP"
    given = tmp_path / "given.json"
    given.write_text(json.dumps(body))
    place.again(given, tmp_path / "two")
    assert "it has other models.clip, facts.judge_digest" in caplog.text


def test_another_network_or_overlap_is_an_error(place: Place, tmp_path: Path) -> None:
    body = json.loads(place.run("coco", tmp_path / "first"))
    given = tmp_path / "given.json"
    facts = body["facts"]
    for changed, reason in (
        ({"overlap": "12ab"}, "has the overlap 12ab, now it is none: give --overlap as then"),
        ({"network": "inception 12ab"}, "the network inception 12ab.*give --inception as then"),
    ):
        given.write_text(json.dumps({**body, "facts": {**facts, **changed}}))
        out = tmp_path / "out"
        with pytest.raises(InputError, match=reason):
            evaluate([*place.data("coco"), f"--suite={given}", f"--out={out}", *place.flags])
        assert not out.exists()


def test_figures_that_are_not_repeated_are_an_error(
    place: Place, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.loads(shapes.read_bytes())
    body["results"]["rows"][1]["chance"] += 0.5
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(body))
    with pytest.raises(TapirError, match="does not repeat the figures"):
        place.again(changed, tmp_path / "one")
    body["versions"]["torch"] = "1.0"
    changed.write_text(json.dumps(body))
    place.again(changed, tmp_path / "two")
    assert "with other versions.torch" in caplog.text


def test_a_file_that_does_not_say_what_it_measured_is_not_repeated(
    place: Place, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.loads(shapes.read_bytes())
    settings = body.pop("settings")
    given = tmp_path / "given.json"
    given.write_text(json.dumps(body))
    place.again(given, tmp_path / "one", "--candidates=3")
    assert "does not say its settings: it may be another evaluation" in caplog.text
    body["settings"] = {n: value for n, value in settings.items() if n != "candidates"}
    given.write_text(json.dumps(body))
    place.again(given, tmp_path / "two", "--candidates=3")
    assert "does not say its settings.candidates" in caplog.text


def test_a_file_may_be_written_by_hand(place: Place, tmp_path: Path) -> None:
    given = tmp_path / "mine.json"
    captions = ["a small red circle", "a large blue square"]
    rows = [{"caption": caption} for caption in captions]
    weights = write_open_clip(tmp_path / "judge") / WEIGHTS
    turned = load_file(weights)
    turned["visual.proj"] *= -1  # or all cosines are negative, which score 0
    save_file(turned, weights)
    settings = {"candidates": 2, "judge": str(tmp_path / "judge")}
    given.write_text(json.dumps({"suite": "clipscore", "prompts": rows, "settings": settings}))
    body = place.again(given, tmp_path / "out")
    judge = open_ranker(tmp_path / "judge", Path("/nowhere"))
    assert body["facts"]["judge_digest"] == judge.digest and body["prompts"] == rows
    studio = open_studio(place.models)
    from_hand = []
    for caption in captions:
        pixels = torch.cat([studio.decode(codes) for codes in _codes(studio, caption, 2)])
        whole = (pixels * 255).round() / 255
        cosines = judge.scores([f"A photo depicts {caption}"], whole, 2)[0]
        from_hand.append(2.5 * np.maximum(cosines, 0))
    assert body["results"]["single"] == pytest.approx(float(np.mean(from_hand)), abs=1e-6)
    assert body["results"]["label"] == "CLIPScore" and body["results"]["single"] > 0


def test_clipscore_is_named_after_the_role_of_its_judge(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [caption.text for caption in open_evaluation(str(place.raw)).captions]
    judges = {
        "proxy CLIPScore (CLIP of the run)": place.models.clip,
        "proxy CLIPScore (CLIP by Tapir)": write_models(tmp_path / "a", captions, seed=1).clip,
        "CLIPScore": write_open_clip(tmp_path / "judge"),
    }
    for at, (label, judge) in enumerate(judges.items()):
        body = json.loads(place.run("clipscore", tmp_path / str(at), f"--judge={judge}"))
        assert body["facts"]["label"] == label
        assert f"{label}, best of 3" in {figure["name"] for figure in body["headline"]}
    monkeypatch.setattr(finished, "PIXELS", 32)
    large = write_models(tmp_path / "b", captions).clip
    with pytest.raises(InputError, match="trained on pictures of 32 pixels, the dVAE's have 16"):
        place.run("clipscore", tmp_path / "none", f"--judge={large}")


def _codes(studio: Studio, caption: str, count: int) -> list[torch.Tensor]:
    drawn = studio.codes([caption], DrawSettings(candidates=count))
    return [each.codes.flatten(0, 1) for each in drawn]


def test_best_of_n_goes_on_after_its_blocks(place: Place, tmp_path: Path) -> None:
    out = shutil.copytree(place.measured("best-of-n"), tmp_path / "out")
    first = (out / FILE).read_bytes()
    (blocks,) = out.glob("blocks-*")
    before = {path: path.stat().st_mtime_ns for path in blocks.iterdir()}
    assert len(before) == 6
    lost = blocks / "drawn-000003.safetensors"
    lost.unlink()
    (out / FILE).unlink()
    assert place.run("best-of-n", out) == first
    changed = {path for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {lost}
    before = {path: path.stat().st_mtime_ns for path in blocks.iterdir()}
    rows = json.loads(place.run("best-of-n", out, "--repeats=1"))["results"]["rows"]
    assert [row["groups"] for row in rows] == [1, 1, 1, 1]
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("blocks-*/*")}


def test_best_of_n_is_the_fid_of_the_best_pictures(place: Place) -> None:
    out = place.measured("best-of-n")
    body = json.loads((out / FILE).read_bytes())
    rows = {row["n"]: row for row in body["results"]["rows"]}
    assert list(rows) == [1, 2, 4, 8] and [row["groups"] for row in rows.values()] == [3, 3, 2, 1]
    evaluation = open_evaluation(str(place.raw))
    chosen = evaluation.choose(5, 0)
    studio, captions = open_studio(place.models), [caption.text for caption in chosen]
    network = open_network(None, place.models, captions, CPU)

    drawn = studio.draw(captions, DrawSettings(candidates=8))
    best, _ = network(np.stack([row.pictures[0] for row in drawn]))
    names = evaluation.pictures_of(chosen)
    images = [decode_rgb(evaluation.read(name), name) for name in names]
    real, _ = network(np.stack([square(image, 16) for image in images]))
    expected = frechet_distance(Moments.of(best), Moments.of(real))
    assert rows[8]["fid"] == pytest.approx(expected, rel=1e-5) and "fid_std" not in rows[8]
    assert rows[8]["accuracy"] == 0 and body["results"]["label"].startswith("proxy")
    (blocks,) = out.glob("blocks-*")
    scores = load_file(blocks / "drawn-000000.safetensors")["scores"]
    assert scores[drawn[0].drawn].tolist() == drawn[0].scores.tolist()


REFUSED: list[tuple[list[str], type[TapirError], str]] = [
    (["--suite", "shape"], InputError, "did you mean 'shapes'"),
    (["--suite="], InputError, "there is no suite ''"),
    (["--suite", "shapes"], ConfigError, "suite shapes needs DATA"),
    (["RAW", "--suite", "geneval-style"], ConfigError, "reads no data set; leave"),
    (["RAW", "--suite", "coco"], InputError, "give --suite pairs"),
    (["RAW", "--suite", "shapes", "--worker=0/2"], InputError, "not shared by workers"),
    (["--suite", "FILE", "--prompts=3"], ConfigError, "has its own prompts; leave --prompts out"),
    (["--suite", "nowhere.json"], InputError, r"there is no nowhere\.json"),
    (["RAW", "--suite", "best-of-n", "--captions=1"], ConfigError, "a FID needs two pictures"),
    (["RAW", "--suite", "shapes", "--prompts=1"], ConfigError, "prompts=1 must be at least 2"),
    (["RAW", "--suite", "clipscore", "--captions=1"], ConfigError, "captions=1 must be at least 2"),
    (["COCO", "--suite", "shapes", "--prompts=3"], InputError, "not a caption of the shapes"),
    (["--suite", "shapes", "--prompt=3"], InputError, "did you mean '--prompts'"),
]


@pytest.mark.parametrize(("arguments", "kind", "reason"), REFUSED)
def test_wrong_input_is_refused(
    arguments: list[str],
    kind: type[TapirError],
    reason: str,
    place: Place,
    shapes: Path,
    tmp_path: Path,
) -> None:
    names = {"RAW": str(place.raw), "FILE": str(shapes), "COCO": place.data("coco")[0]}
    given = [names.get(argument, argument) for argument in arguments]
    with pytest.raises(kind, match=reason):
        evaluate([*given, f"--out={tmp_path / 'out'}", *place.flags])
    assert not (tmp_path / "out" / FILE).exists()


def test_folders_of_others_are_refused(place: Place, shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has other settings\.temperature"):
        place.run("shapes", shapes.parent, "--temperature=0.5")
    with pytest.raises(InputError, match="holds what `tapir evaluate --suite` wrote"):
        evaluate([str(place.raw), f"--out={shapes.parent}", *place.flags])
    with pytest.raises(InputError, match="holds what `tapir evaluate --suite` wrote"):
        refuse_others_folder(shapes.parent, "demo")
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CorruptError, match="is damaged"):
        place.run("shapes", tmp_path)


def test_two_evaluations_do_not_share_a_folder(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts while the first draws; the first, started again, goes on."""
    measure = PanelsSuite.measure

    def stopped(suite: PanelsSuite, studio: Callable[[], Studio]) -> Any:
        monkeypatch.setattr(PanelsSuite, "measure", measure)
        with pytest.raises(InputError, match=rf"{REQUEST} has other settings\.temperature"):
            place.run("panels", tmp_path, "--temperature=0.7")
        raise KeyboardInterrupt

    monkeypatch.setattr(PanelsSuite, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        place.run("panels", tmp_path)
    assert owner_of(tmp_path) == "evaluate --suite"
    assert [path.name for path in tmp_path.iterdir()] == [REQUEST]
    assert json.loads(place.run("panels", tmp_path))["settings"]["temperature"] == 0.5


FILES: list[tuple[Callable[[dict[str, Any]], Any], type[TapirError], str]] = [
    (lambda body: {**body, "suite": "shape"}, ConfigError, "did you mean 'shapes'"),
    (lambda body: {**body, "format": 2}, InputError, "is of another format"),
]


@pytest.mark.parametrize(("change", "kind", "reason"), FILES)
def test_files_that_are_none_are_refused(
    change: Callable[[dict[str, Any]], Any],
    kind: type[TapirError],
    reason: str,
    place: Place,
    shapes: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps(change(json.loads(shapes.read_bytes()))))
    with pytest.raises(kind, match=reason):
        place.again(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "suite", "rest"),
    [
        (["raw", "--suite", "coco", "--seed=1"], "coco", ["raw", "--seed=1"]),
        (["--suite=a/b.json", "raw"], "a/b.json", ["raw"]),
        (["raw", "--help"], None, ["raw", "--help"]),
        (["raw", "--", "--suite", "coco"], None, ["raw", "--", "--suite", "coco"]),
        (["raw", "--suite"], None, ["raw", "--suite"]),
    ],
)
def test_the_flag_is_taken_from_the_command_line(
    arguments: list[str], suite: str | None, rest: list[str]
) -> None:
    assert suite_flag(arguments) == (suite, rest)
