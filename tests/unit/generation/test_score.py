"""`tapir score`: bitwise equal results for any kills and workers; wrong input is refused."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.evaluate import score
from core.config import to_json
from core.errors import CorruptError, InputError, TapirError
from core.files.atomic import sha256
from core.keys import keyed_rng
from core.workers import JobWorker
from data_pipeline.evaluation_sets import open_evaluation
from data_pipeline.formats.raw import parse_pairs
from generation.config import ModelPaths, ScoreConfig
from generation.evaluation.feature_extractors import ClipProxy, blurred
from generation.evaluation.open_score import open_job
from generation.evaluation.score_job import ScoreJob
from generation.text_to_image import open_studio
from models.critics.fid import frechet_distance_of_few
from models.critics.inception import Inception
from models.dvae import DVAE
from models.third_party import foreign_module
from parallel.device import CPU
from tests.harness import tapir
from tests.second_device import SECOND
from tests.unit.finished import write_models
from tests.unit.layouts import write_coco, write_cub
from tests.unit.training.test_pins_training import _dvae_task, _picture
from training.tasks import dvae as task_of_dvae

pytestmark = pytest.mark.seconds

CONFIG = ScoreConfig(candidates=2, captions=22, block=5, radii=(0.0, 1.0, 4.0))
ALONE = JobWorker(number=0, count=1)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Models and an evaluation set."""

    models: ModelPaths
    data: str

    def job(self, out: Path, config: ScoreConfig = CONFIG, **also: Any) -> ScoreJob:
        given = {"inception": None, "overlap": None, **also}
        return open_job(self.data, self.models, config=config, out=out, **given)

    def run(self, out: Path, member: JobWorker = ALONE, **also: Any) -> dict[str, Any]:
        return self.job(out, **also).run(lambda: open_studio(self.models), member)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("score")
    data = f"coco:{write_coco(folder / 'coco', 16)}"
    captions = [caption.text for caption in open_evaluation(data).captions]
    return Place(models=write_models(folder, captions), data=data)


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """Runs in a fresh process: the state of other tests changes the last bits of CLIP's scores."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as pool:
        yield pool


@pytest.fixture(scope="module")
def unbroken(
    place: Place, apart: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    assert apart.submit(place.run, out).result() is not None
    return out


def _digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and ".tmp-" not in path.name]
    return {path.relative_to(out).as_posix(): sha256(path.read_bytes()) for path in files}


def _die_at(place: Place, out: Path, call: int) -> None:
    """Runs until the n-th call of the network, and kills the process there."""
    torch.set_num_threads(1)
    job = place.job(out)
    network, calls = job._network, [0]

    class Deadly:
        label, name, proxy = network.label, network.name, network.proxy

        def __call__(self, pictures: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return network(pictures)

    job._network = Deadly()
    job.run(lambda: open_studio(place.models), ALONE)


def test_features_come_from_the_given_device(place: Place, tmp_path: Path) -> None:
    pictures = keyed_rng("pictures").integers(0, 256, (3, 16, 16, 3), np.uint8)
    here, there = (place.job(tmp_path, device=device)._network for device in (CPU, SECOND))
    assert isinstance(there, ClipProxy) and there._classes.device == SECOND
    for ours, cpus in zip(there(pictures), here(pictures), strict=True):
        assert np.array_equal(ours, cpus)


def test_scores_say_what_they_are(place: Place, unbroken: Path) -> None:
    scores = json.loads((unbroken / "scores.json").read_text())
    assert "proxy" in scores["label"] and "not comparable" in scores["label"]
    assert scores["captions"] == 22 and scores["candidates"] == 2
    assert scores["numerics"]["matmul"] == scores["numerics"]["conv"] == "highest"
    assert [row["radius"] for row in scores["rows"]] == [0.0, 1.0, 4.0]
    chosen = open_evaluation(place.data).choose(22, 0)
    names = {name for caption in chosen for name in caption.pictures}
    assert {row["pictures"] for row in scores["rows"]} == {len(names)} == {scores["pictures"]}
    assert all(row["fid"] > 0 and row["is"] >= 1 for row in scores["rows"])
    assert len({row["fid"] for row in scores["rows"]}) == 3
    records = [
        r
        for path in sorted((unbroken / "pictures").iterdir())
        for r in parse_pairs(path.read_bytes())
    ]
    assert [record.caption for record in records] == [caption.text for caption in chosen]


def test_workers_and_kills_change_no_bit(
    place: Place, apart: ProcessPoolExecutor, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spawn = multiprocessing.get_context("spawn")
    for call in (2, 5):
        process = spawn.Process(target=_die_at, args=(place, out, call))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "scores.json").exists()
    assert len(list((out / "pictures").iterdir())) == 2
    for number in (1, 0, 2):  # the first one does all, also the part of the others
        done = apart.submit(place.run, out, JobWorker(number=number, count=3)).result()
        assert done == json.loads((out / "scores.json").read_text())
    assert _digests(out) == _digests(unbroken)


def test_other_settings_models_and_data_are_refused(
    place: Place, unbroken: Path, tmp_path: Path
) -> None:
    others: list[tuple[str, Place, dict[str, Any]]] = [
        ("candidates", place, {"candidates": 3}),
        ("captions", place, {"captions": 21}),
        ("seed", place, {"seed": 1}),
        ("block", place, {"block": 6}),
    ]
    texts = [caption.text for caption in open_evaluation(place.data).captions]
    models = write_models(tmp_path, texts, seed=1)
    others.append(("clip, prior", Place(models=models, data=place.data), {}))
    others.append(("data", Place(models=place.models, data=f"cub:{write_cub(tmp_path)}"), {}))
    before = _digests(unbroken)
    for names, other, change in others:
        config = ScoreConfig(**{**to_json(CONFIG), "radii": CONFIG.radii, **change})
        with pytest.raises(InputError, match=f"with other {names} "):
            other.run(unbroken, config=config)
    assert _digests(unbroken) == before


def test_other_radii_take_the_pictures_that_are_there(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = place.run(out)
    assert first is not None
    fresh = ScoreConfig(**{**to_json(CONFIG), "radii": (0.0, 2.0)})
    scores = place.job(out, fresh).run(lambda: pytest.fail("drawn again"), ALONE)
    assert scores is not None and [row["radius"] for row in scores["rows"]] == [0.0, 2.0]
    assert scores["rows"][0]["fid"] == first["rows"][0]["fid"]


def _forget_scores(out: Path) -> None:
    for path in out.glob("features-*/scores-*.json"):
        path.unlink()


def test_damaged_blocks_are_named(place: Place, tmp_path: Path) -> None:
    place.run(tmp_path)
    path = next(tmp_path.glob("features-*/drawn-000001.safetensors"))
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        _forget_scores(tmp_path)
        with pytest.raises(CorruptError, match=r"drawn-000001\.safetensors is damaged; delete"):
            place.run(tmp_path)
    path.unlink()  # it is made again
    expected = (tmp_path / "scores.json").read_bytes()
    place.run(tmp_path)
    assert path.read_bytes() == whole and (tmp_path / "scores.json").read_bytes() == expected
    _forget_scores(tmp_path)
    path.unlink()
    tar = tmp_path / "pictures" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(CorruptError, match=r"000001\.tar is damaged"):
        place.run(tmp_path)


def test_a_second_score_leaves_the_overlap_out(
    place: Place, unbroken: Path, tmp_path: Path
) -> None:
    evaluation = open_evaluation(place.data)
    seen = evaluation.pictures[3:9]
    body = {"fingerprint": evaluation.fingerprint, "threshold": 0.9, "share": 6 / 16, "ids": seen}
    path = tmp_path / "overlap.json"
    path.write_text(json.dumps({"evaluation": body}))
    scores = place.run(unbroken, overlap=path)
    assert scores is not None
    kept = [c for c in evaluation.choose(22, 0) if not set(c.pictures) & set(seen)]
    rows = [row for row in scores["rows"] if row["set"] == "without overlap"]
    assert [row["captions"] for row in rows] == 3 * [len(kept)]
    assert [row["pictures"] for row in rows] == 3 * [len({n for c in kept for n in c.pictures})]
    assert scores["overlap"]["captions_left_out"] == 22 - len(kept) > 0
    assert scores["overlap"]["share"] == 6 / 16 and scores["overlap"]["threshold"] == 0.9
    assert rows[0]["fid"] != scores["rows"][0]["fid"]
    plain = json.loads((unbroken / "scores.json").read_text())["rows"][:3]
    assert plain == [row for row in scores["rows"] if row["set"] == "all"]
    path.write_text(json.dumps({"evaluation": {**body, "fingerprint": "other"}}))
    with pytest.raises(InputError, match="about another evaluation set"):
        place.run(unbroken, overlap=path)
    path.write_text(json.dumps({"evaluation": {**body, "ids": evaluation.pictures}}))
    with pytest.raises(InputError, match="fewer than two captions or pictures"):
        place.run(unbroken, overlap=path)


def test_blur_is_a_gaussian_of_that_deviation() -> None:
    point = np.zeros((1, 65, 65, 3), np.uint8)
    point[0, 32, 32] = 255
    wide = blurred(cv2.dilate(point[0], np.ones((9, 9)))[None], 4.0)[0, :, :, 0].astype(float)
    places = np.arange(65) - 32
    variance = (wide.sum(0) * places**2).sum() / wide.sum()
    assert variance == pytest.approx(16 + (81 - 1) / 12, rel=0.05)
    assert blurred(point, 0.0) is point and blurred(point, 1.0).shape == point.shape


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of the right shapes."""
    module: Any = foreign_module("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    module.load_state_dict_from_url, kept = (lambda *_, **__: {}), module.load_state_dict_from_url

    class Untrained(module.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, *_: Any, **__: Any) -> None: ...

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Untrained("inception", ["2048"])
    module.load_state_dict_from_url = kept
    weights = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    save_file({**weights, "fc.bias": weights["fc.bias"] + 9}, path)
    return path


def test_inception_is_torch_fidelitys_with_the_given_weights(inception: Path) -> None:
    pictures = keyed_rng(0, "inception").integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    network = Inception(inception)
    features, logits = network(pictures)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert features.dtype == logits.dtype == np.float32
    assert np.abs(features[0] - features[1]).max() > 0
    weights = network._network.fc.weight.numpy()
    np.testing.assert_allclose(logits, features @ weights.T, rtol=1e-3, atol=1e-4)
    assert sha256(inception.read_bytes()) in network.name and "proxy" not in network.label


@torch.no_grad()
def test_a_dvae_reports_the_fid_of_its_reconstructions(
    inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its pictures in 8 bits: the distance of their features, least to themselves."""
    task, beats = _dvae_task(rfid=inception), list[str]()
    task._set_inception(inception)
    monkeypatch.setattr(task_of_dvae, "EXTRACTED", 2)
    monkeypatch.setattr(task_of_dvae, "Inception", None)  # it is not built again
    records = [_picture(i, 10) for i in range(3)]
    pixels, size = task._squares(records, task.held_out), task.model_config
    task.dvae = DVAE(size)
    task.dvae.tokens = lambda image: torch.zeros(len(image), size.tokens, dtype=torch.int64)  # type: ignore[method-assign]
    features, distances = [], []
    for shown in (pixels, (pixels * 0.5).clamp(0, 1)):
        task.dvae.picture = lambda codes, shown=shown: shown  # type: ignore[method-assign, misc]
        rows = (shown * 255).round().byte().permute(0, 2, 3, 1).numpy()
        features.append(Inception(inception)(rows)[0])
        figures, _ = task.figures(cast(Any, None), records, records, beats.append)
        distances.append(figures["rfid"])
        assert figures["rfid"] == frechet_distance_of_few(features[0], features[-1])
    assert distances[1] > abs(distances[0])
    assert beats == ["rfid"] * 8, "3 pictures twice, 2 at a time, at each validation"


def test_wrong_inception_weights_are_explained(inception: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "weights.safetensors"
    with pytest.raises(InputError, match=r"no Inception weights at .* releases of torch-fidelity"):
        Inception(wrong)
    torch.save({"fc.bias": torch.zeros(3)}, wrong)
    with pytest.raises(InputError, match="no pickle is loaded"):
        Inception(wrong)
    save_file({"fc.bias": torch.zeros(3)}, wrong)
    with pytest.raises(InputError, match="other weights than this Inception's"):
        Inception(wrong)


def test_the_advice_turns_a_pickle_into_weights(inception: Path, tmp_path: Path) -> None:
    torch.save(load_file(inception), tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(InputError) as caught:
        Inception(tmp_path / "none")
    program, *rest = shlex.split(str(caught.value).splitlines()[1])
    assert program == "python"
    subprocess.run([sys.executable, *rest], cwd=tmp_path, check=True)
    network, other = Inception(inception), Inception(tmp_path / "inception.safetensors")
    assert network._network.fc.bias.equal(other._network.fc.bias)


@pytest.mark.world
def test_the_command_from_end_to_end(place: Place, tmp_path: Path) -> None:
    flags = [*_models(place), "--candidates=1", "--captions=12", "--block=4", "--radii", "0", "2"]
    data = f"cub:{write_cub(tmp_path / 'cub')}"
    out = tmp_path / "out"
    first = tapir("score", data, f"--out={out}", *flags, "--worker=0/2")
    text = tapir("score", data, f"--out={out}", *flags, "--worker=1/2")
    for each in (first, text):
        assert json.loads(each.splitlines()[0]) == json.loads((out / "scores.json").read_text())
    status = tapir("status", str(out))
    assert "tasks" in status and "; finished" in status
    assert "proxy" in text and "radius" in text
    assert "with other seed" in tapir("score", data, f"--out={out}", *flags, "--seed=5", code=2)


def _models(place: Place) -> list[str]:
    return [f"--{name}={folder}" for name, folder in to_json(place.models).items()]


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        ("cub:{here}", [], "images.txt is missing"),
        ("coco:{here}", [], "unpack MS-COCO"),
        ("{here}", [], "no .*manifest.json"),
        ("{data}", ["--inception={here}/none"], "releases of torch-fidelity"),
        ("{data}", ["--overlap={here}/none"], "not an overlap.json"),
        ("{data}", ["--prior={here}/none"], "no prior in"),
        ("{data}", ["--radii", "-1"], "radii must be"),
        ("{data}", ["--radii", "1", "1"], "radii must differ"),
        ("{data}", ["--block=0"], "block be at least 1"),
        ("{data}", ["--captions=1"], "fewer than two captions"),
        ("{data}", ["--worker=2/2"], "must be i/n"),
    ],
)
def test_wrong_input_ends_before_anything_is_drawn(
    place: Place, tmp_path: Path, data: str, flags: list[str], message: str
) -> None:
    known = {"here": str(tmp_path), "data": place.data}
    given = [flag.format(**known) for flag in (data, *_models(place), *flags)]
    with pytest.raises(TapirError, match=message) as caught:
        score([*given, f"--out={tmp_path / 'out'}"])
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
