"""`tapir sample` with small untrained models: what it writes and what it refuses."""

import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tapir
from core.config import from_json
from core.errors import ConfigError, InputError, no_memory, of_memory
from core.memory import host_memory
from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import decode_rgb
from generation import sample as sample_module
from generation.config import ModelPaths, PromptConfig, SampleConfig, SampleRun
from generation.ranking import TapirRanker
from generation.sample import sample
from generation.sampling.prompts import prompt_of
from generation.text_to_image import open_studio
from models.adapters import adapted, is_adapter
from models.config import LoraConfig, PriorConfig
from models.prior import prior_program
from parallel.mesh import Mesh
from parallel.world import World
from tests.unit.finished import PIXELS, write_models
from training.export.weights import write_model
from training.initial.source import ADAPTERS, adapter_facts, open_source

CAPTIONS = ("a small red circle", "two blue squares")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPaths:
    return write_models(tmp_path_factory.mktemp("models"), list(CAPTIONS))


@pytest.fixture
def run(models: ModelPaths, tmp_path: Path) -> Iterator[SampleRun]:
    draw = SampleConfig(candidates=5, batch=3)
    yield SampleRun(captions=CAPTIONS, out=tmp_path / "best.png", models=models, draw=draw)


def picture(path: Path) -> np.ndarray:
    return decode_rgb(path.read_bytes(), str(path))


def test_the_best_stand_in_rows_and_each_has_a_file(
    run: SampleRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(replace(run, show=3, pictures=tmp_path / "each"))
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(scores) == list(CAPTIONS)
    assert all(len(row) == 3 and row == sorted(row, reverse=True) for row in scores.values())
    assert picture(run.out).shape == (2 * 4 * (PIXELS + 2), 3 * 4 * (PIXELS + 2), 3)
    files = sorted((tmp_path / "each").iterdir())
    assert len(files) == 10 and files[0].name == "caption-000-candidate-000.png"
    assert picture(files[0]).shape == (PIXELS, PIXELS, 3)


def test_without_a_ranking_no_scores_are_printed(
    run: SampleRun, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(replace(run, rerank=False))
    assert capsys.readouterr().out == "" and run.out.is_file()


def test_the_batch_changes_no_byte(run: SampleRun, tmp_path: Path) -> None:
    sample(run)
    for batch in (1, 2, 128):
        other = replace(run, out=tmp_path / f"{batch}.png", draw=replace(run.draw, batch=batch))
        sample(other)
        assert other.out.read_bytes() == run.out.read_bytes()


def test_all_models_are_on_the_device_of_the_rank(run: SampleRun) -> None:
    """CUDA is not asked: a device other than the CPU is used as given."""
    meta = torch.device("meta")
    studio = open_studio(run.models, mesh=Mesh(world=World(device=meta)))
    ranker = studio.ranker
    assert isinstance(ranker, TapirRanker) and studio.sampler.decoder.device == meta
    assert studio.images.device == meta
    assert {parameter.device for parameter in ranker.clip.parameters()} == {meta}


def test_image_prompts_keep_their_tokens(run: SampleRun, tmp_path: Path) -> None:
    colours = np.random.Generator(np.random.Philox(1)).integers(0, 256, (40, 50, 3), np.uint8)
    (tmp_path / "given.png").write_bytes(encode_png(colours))
    studio = open_studio(run.models)
    grid = studio.sampler.config.grid
    codes = studio.codes_of_file(tmp_path / "given.png")
    keep = PromptConfig(image=tmp_path / "given.png", redraw=("2:4,1:3",))
    prompt = prompt_of(codes, keep, grid)
    for drawn in studio.codes(list(CAPTIONS), run.draw.draws, prompt):
        assert (drawn.codes[..., prompt.kept] == codes[prompt.kept]).all()
    sample(replace(run, keep=keep))
    assert run.out.is_file()


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"captions": ()}, "at least one caption"),
        ({"show": 0}, "--show"),
        ({"keep": PromptConfig(keep_rows=2)}, "--image"),
        ({"keep": PromptConfig(image=Path("none.png"), keep_rows=2)}, "no image"),
        ({"pipeline": 0}, "tensor and pipeline"),
        ({"draw": SampleConfig(candidates=0)}, "candidates"),
        ({"tensor": 3}, "2 heads"),
        ({"pipeline": 9}, "4 layers"),
        ({"models": ModelPaths(prior=Path("/nowhere"))}, "no prior in"),
    ],
)
def test_wrong_input_is_named(run: SampleRun, changes: dict[str, object], text: str) -> None:
    with pytest.raises((ConfigError, InputError), match=text):
        sample(replace(run, **changes))
    assert not run.out.exists()


@pytest.mark.parametrize("field", ["out", "pictures"])
def test_a_file_that_cannot_be_written_fails_before_anything_is_drawn(
    run: SampleRun, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("generation.sample.open_studio", lambda *_: pytest.fail("it began"))
    for place in ("/proc/x/best.png", str(tmp_path / "file" / "best.png")):
        with pytest.raises(OSError):
            sample(replace(run, **{field: Path(place)}))


def test_equal_captions_are_drawn_once(run: SampleRun, capsys: pytest.CaptureFixture[str]) -> None:
    sample(replace(run, captions=("a cat", "A cat", "a dog")))
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(scores) == ["a cat", "a dog"]
    assert picture(run.out).shape[0] == 2 * 4 * (PIXELS + 2)


def test_pictures_that_no_memory_holds_are_refused_before_one_is_drawn(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = replace(run, draw=replace(run.draw, candidates=10**9))
    with pytest.raises(ConfigError, match=r"1,000,000,000 candidates of 2 captions are .* GB of"):
        sample(many)
    with monkeypatch.context() as patch:  # overcommit would grant it without having it
        patch.setattr("generation.text_to_image.host_memory", lambda: (1000, 1000))
        with pytest.raises(ConfigError, match="5 candidates of 2 captions are"):
            sample(run)
    assert not run.out.exists()


def test_a_limit_of_the_process_counts_as_memory() -> None:
    """`ulimit -v`: a process cannot use the system's free memory beyond its own limit."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**26
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        assert host_memory()[0] <= 2**26
        with pytest.raises((RuntimeError, MemoryError)) as torchs:
            torch.empty(2**30)
        with pytest.raises(MemoryError) as numpys:
            np.zeros(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    for error in (torchs.value, numpys.value):
        assert no_memory(error)
        assert of_memory(error).exit_code == 2 and "ulimit -v" in str(of_memory(error))
    assert not no_memory(RuntimeError("shapes differ"))


def test_memory_that_runs_out_anywhere_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(_: list[str]) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(sample_module, "verb", verb, raising=False)
    monkeypatch.setitem(tapir.VERBS, "sample", ("generation.sample:verb", ""))
    monkeypatch.setattr("sys.argv", ["tapir", "sample"])
    with pytest.raises(SystemExit) as ended:
        tapir.main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("tapir: memory ran out: ") and "fewer candidates" in lines[0]


def _command(monkeypatch: pytest.MonkeyPatch, models: ModelPaths, out: Path) -> bytes:
    """The picture that `tapir sample` writes."""
    places = [f"--{name}={getattr(models, name)}" for name in ("prior", "dvae", "clip", "bpe")]
    flags = [f"--out={out}", "--candidates=4", "--no-rerank", *places]
    monkeypatch.setattr("sys.argv", ["tapir", "sample", CAPTIONS[0], *flags])
    tapir.main()
    return out.read_bytes()


def test_adapters_that_moved_with_their_base_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their picture is that of a prior with the merged weights, and not the base's."""
    home, lora = tmp_path / "home", LoraConfig(rank=2, alpha=6.0)
    base = open_source(str(write_models(home, list(CAPTIONS)).prior), "prior")
    config, draws = from_json(PriorConfig, base.config), torch.Generator().manual_seed(0)
    tensors = {
        f"{layer.name}.{name}": torch.randn(parameter.shape, generator=draws)
        for layer in adapted(prior_program(config, 0), lora, 0).layers
        for name, parameter in layer.build().named_parameters()
        if is_adapter(name)
    }
    folder, shapes = home / "adapters", {name: tuple(x.shape) for name, x in tensors.items()}
    noted = {ADAPTERS: adapter_facts(lora, base.url, base.digest, folder)}
    facts = {**base.facts, **noted}
    write_model(folder, "prior", base.config, facts, shapes, tensors.__getitem__)
    both = open_source(str(folder), "prior")
    write_model(home / "merged", "prior", both.config, both.facts, both.shapes, both.tensor)
    moved = home.rename(tmp_path / "moved")
    models = ModelPaths(**{name: moved / name for name in ("prior", "dvae", "clip", "bpe")})
    pictures = [
        _command(monkeypatch, replace(models, prior=moved / name), tmp_path / f"{name}.png")
        for name in ("adapters", "merged", "prior")
    ]
    assert pictures[0] == pictures[1] != pictures[2]
    write_models(moved, list(CAPTIONS), seed=1)
    with pytest.raises(SystemExit) as ended:
        _command(monkeypatch, replace(models, prior=moved / "adapters"), tmp_path / "no.png")
    assert ended.value.code == 2 and "holds another one now" in capsys.readouterr().err
