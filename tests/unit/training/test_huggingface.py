"""Export of models to one Hugging Face folder and import; also of unfinished runs."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer

from checkpoint.format import StateSlice
from checkpoint.tensors import file_parts
from checkpoint.writer import write_checkpoint
from core.config import to_json
from core.errors import InputError
from core.files.atomic import canonical_json, seal, sha256, unseal
from core.storage.store import open_store
from data_pipeline.text.bpe import load_tokenizer, save_tokenizer, train_bpe
from models.clip import Clip
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.prior import build_prior
from tests.harness import tapir
from training.export.huggingface import INDEX, SHARDS, export_parts, find_parts, import_parts
from training.export.weights import KINDS, load_clip, load_dvae, load_prior, open_model, write_model

CAPTIONS = ["a small red circle", "two blue squares"]
DVAE_SIZES = DVAEConfig(pixels=16, width=4, codebook=32, code_width=8)
STAGES = ("dvae", "prior", "clip")
GIGABYTE = 10**9


def _tensors(stage: str, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    prefix = KINDS[stage].prefix
    return {f"{prefix}{name}": p.detach() for name, p in network.named_parameters()}


def _write(folder: Path, stage: str, config: Any, network: torch.nn.Module, facts: Any) -> str:
    tensors = _tensors(stage, network)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return write_model(folder, stage, to_json(config), facts, shapes, tensors.__getitem__)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Run folders of matching tiny models with keyed weights."""
    folder = tmp_path / "runs"
    save_tokenizer(train_bpe(CAPTIONS, 280), folder / "bpe")
    tokenizer, text = load_tokenizer(folder / "bpe")
    entries = tokenizer.get_vocab_size()
    dvae = _write(folder / "dvae", "dvae", DVAE_SIZES, DVAE(DVAE_SIZES, 1), {"raw": "r"})
    prior = PriorConfig(
        dim=24, layers=2, text_length=8, text_vocabulary=entries, image_vocabulary=32, grid=4
    )
    facts = {"dvae": dvae, "tokenizer": text, "grid": 4, "step": 7, "validation": {"loss": 1.25}}
    _write(folder / "prior", "prior", prior, build_prior(prior, 2), facts)
    clip = ClipConfig(pixels=16, dim=16, heads=2, layers=1, text_length=8, text_vocabulary=entries)
    _write(folder / "clip", "clip", clip, Clip(clip, 3), {"tokenizer": text, "raw": "r"})
    return folder


@pytest.fixture(params=[GIGABYTE, 30_000], ids=["whole", "shards"])
def exported(request: pytest.FixtureRequest, runs: Path, tmp_path: Path) -> Path:
    export_parts(find_parts(runs, {}), tmp_path / "hub", request.param)
    return tmp_path / "hub"


def test_a_file_made_piece_by_piece_is_the_librarys_file() -> None:
    tensors = {
        "b.w": torch.rand(3, 5),
        "b": torch.rand(()),
        "a/ü": torch.rand(7),
        "B": torch.ones(0),
    }
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    for metadata in (None, {"format": "pt"}):
        parts = file_parts(shapes, tensors.__getitem__, metadata)
        assert b"".join(bytes(part) for part in parts) == save(tensors, metadata)


def test_what_was_exported_comes_back_byte_for_byte(
    runs: Path, exported: Path, tmp_path: Path
) -> None:
    assert set(import_parts(exported, tmp_path / "back")) == {*STAGES, "bpe"}
    for path in runs.rglob("*.*"):
        again = tmp_path / "back" / path.relative_to(runs)
        assert again.read_bytes() == path.read_bytes(), path
    assert load_dvae(tmp_path / "back" / "dvae")[1] == load_prior(runs / "prior")[2]["dvae"]


def test_other_libraries_read_the_folder(runs: Path, exported: Path) -> None:
    networks = (
        load_dvae(runs / "dvae")[0],
        load_prior(runs / "prior")[0],
        load_clip(runs / "clip")[0],
    )
    for stage, expected in zip(STAGES, networks, strict=True):
        config = json.loads((exported / stage / "config.json").read_bytes())
        assert config["model_type"] == f"tapir-{stage}" and config["dtype"] == "float32"
        kind = KINDS[stage]
        mine: Any = kind.build(kind.config(**config["sizes"]))
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter.zero_()
        load_torch_model(mine, exported / stage, strict=True)
        pairs = zip(mine.parameters(), expected.parameters(), strict=True)
        assert all(a.equal(b) for a, b in pairs), stage
        for path in (exported / stage).glob("*.safetensors"):
            with safe_open(str(path), "pt") as file:
                assert file.metadata() == {"format": "pt"}
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer" / "tokenizer.json"))
    assert (
        tokenizer.encode(CAPTIONS[0]).ids == load_tokenizer(runs / "bpe")[0].encode(CAPTIONS[0]).ids
    )
    card = (exported / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "tapir import hub runs/hub" in card
    assert f"`{open_model(runs / 'dvae', 'dvae').digest}`" in card and "loss 1.25" in card


def test_shards_are_no_larger_than_the_limit(runs: Path, tmp_path: Path) -> None:
    export_parts(find_parts(runs / "prior", {}), tmp_path / "hub", 30_000)
    folder = tmp_path / "hub" / "prior"
    index = json.loads((folder / SHARDS).read_bytes())
    files = sorted(folder.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values()) and len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(4 * v.numel() for v in load_file(path).values()) for path in files]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 30_000
    for path in files:
        named = {name for name, file in index["weight_map"].items() if file == path.name}
        assert load_file(path).keys() == named


Damage = Callable[[Path], None]


def _change(path: Path, change: Callable[[dict[str, Any]], None], sealed: bool = True) -> None:
    body = unseal(path.read_bytes(), "") if sealed else json.loads(path.read_bytes())
    change(body)
    path.write_bytes(seal(body) if sealed else canonical_json(body))


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(hub: Path) -> None:
        path = hub / "dvae" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def _flip(name: str) -> Damage:
    def damage(hub: Path) -> None:
        data = bytearray((hub / name).read_bytes())
        data[len(data) * 3 // 4] ^= 1
        (hub / name).write_bytes(data)

    return damage


FIRST = "encoder.input.bias"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no index": (lambda hub: (hub / INDEX).unlink(), "there is no .*model_index"),
    "another's index": (lambda hub: (hub / INDEX).write_text("{}"), "or `tapir export` did not"),
    "an index byte": (_flip(INDEX), "is damaged, or"),
    "a config byte": (_flip("dvae/config.json"), "is damaged, or"),
    "no config": (lambda hub: (hub / "clip/config.json").unlink(), "there is no .*clip/config"),
    "a tokenizer byte": (_flip("tokenizer/tokenizer.json"), "tokenizer"),
    "no tokenizer": (lambda hub: shutil.rmtree(hub / "tokenizer"), "there is no .*tokenizer.json"),
    "no weights": (lambda hub: (hub / "dvae/model.safetensors").unlink(), "missing or not a whole"),
    "half a file": (
        lambda hub: (hub / "dvae/model.safetensors").write_bytes(b"\x10" + b"\0" * 99),
        "missing or not a whole safetensors",
    ),
    "a weight's byte": (
        _flip("dvae/model.safetensors"),
        "damaged or changed|holds values like NaN",
    ),
    "NaN": (_weights(lambda t: t[FIRST].fill_(torch.nan)), "input.bias holds values like NaN"),
    "16 bits": (_weights(lambda t: t.update({FIRST: t[FIRST].half()})), "is torch.float16"),
    "another shape": (_weights(lambda t: t.update({FIRST: torch.ones(5)})), "1 tensors do not fit"),
    "one more": (_weights(lambda t: t.update(more=torch.ones(1))), "such as dvae.dvae.more"),
    "one less": (_weights(lambda t: t.pop(FIRST)), "1 tensors do not fit, such as .*input.bias"),
    "another model": (
        lambda hub: shutil.copytree(hub / "clip", hub / "dvae", dirs_exist_ok=True),
        "is not of the dvae",
    ),
    "other sizes": (
        lambda hub: _change(hub / "dvae/config.json", lambda b: b["sizes"].update(width=8)),
        "tensors do not fit",
    ),
    "no such size": (
        lambda hub: _change(hub / "dvae/config.json", lambda b: b["sizes"].update(wide=8)),
        "unknown 'wide'",
    ),
    "a size of text": (
        lambda hub: _change(hub / "dvae/config.json", lambda b: b["sizes"].update(width="8")),
        "must be a whole number",
    ),
    "no facts": (
        lambda hub: _change(hub / "dvae/config.json", lambda b: b.pop("facts")),
        "has no 'facts'",
    ),
    "no tie": (
        lambda hub: _change(hub / "prior/config.json", lambda b: b["facts"].pop("dvae")),
        "does not name the dvae of its prior",
    ),
    "parts of text": (
        lambda hub: _change(hub / INDEX, lambda b: b.update(parts="dvae")),
        "has no 'parts'",
    ),
    "a part of text": (
        lambda hub: _change(hub / INDEX, lambda b: b["parts"].update(clip="here")),
        "is not of the clip",
    ),
    "a newer format": (
        lambda hub: _change(hub / INDEX, lambda b: b.update(format_version=9)),
        "of another format",
    ),
    "a part unknown": (
        lambda hub: _change(hub / INDEX, lambda b: b["parts"].update(evil={"sha256": ""})),
        "a part 'evil'",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_or_foreign_is_refused(case: str, runs: Path, tmp_path: Path) -> None:
    damage, reason = DAMAGES[case]
    export_parts(find_parts(runs, {}), tmp_path / "hub", GIGABYTE)
    damage(tmp_path / "hub")
    with pytest.raises(Exception, match=reason) as caught:
        import_parts(tmp_path / "hub", tmp_path / "back")
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".tmp-*"))


def test_damaged_shards_are_refused(runs: Path, tmp_path: Path) -> None:
    export_parts(find_parts(runs / "prior", {}), tmp_path / "hub", 30_000)
    path = tmp_path / "hub" / "prior" / SHARDS
    whole = path.read_bytes()
    first = sorted(path.parent.glob("*.safetensors"))[0]
    _change(path, lambda b: b["weight_map"].update({"x": "../../evil"}), sealed=False)
    with pytest.raises(InputError, match="outside of its folder"):
        import_parts(tmp_path / "hub", tmp_path / "back")
    path.write_text("[]")
    with pytest.raises(InputError, match="is damaged"):
        import_parts(tmp_path / "hub", tmp_path / "back")
    path.write_bytes(whole)
    first.unlink()
    with pytest.raises(InputError, match=r"model-00001-of-.* is missing"):
        import_parts(tmp_path / "hub", tmp_path / "back")


def test_only_models_that_belong_together_are_exported(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    _write(other, "dvae", DVAE_SIZES, DVAE(DVAE_SIZES, 5), {})
    with pytest.raises(InputError, match=r"trained with another dvae; give the one .* as --dvae"):
        find_parts(runs, {"dvae": other})
    save_tokenizer(train_bpe(["z"], 257), other)
    with pytest.raises(InputError, match=r"trained with another tokenizer; .* --bpe"):
        find_parts(runs, {"bpe": other})
    with pytest.raises(InputError, match="holds no run"):
        find_parts(tmp_path, {})
    broken = DVAE(DVAE_SIZES, 5)
    torch.nn.init.constant_(broken.encoder[0].bias, torch.inf)
    _write(other, "dvae", DVAE_SIZES, broken, {})
    with pytest.raises(InputError, match="holds values like NaN"):
        export_parts(find_parts(other, {}), tmp_path / "out", GIGABYTE)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_never_overwritten(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    out.mkdir()
    export_parts(find_parts(runs, {}), out, GIGABYTE)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    for place in (out, runs):
        with pytest.raises(InputError, match="holds something already"):
            export_parts(find_parts(runs, {}), place, GIGABYTE)
        with pytest.raises(InputError, match="holds something already"):
            import_parts(out, place)
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}
    left = tmp_path / ".tmp-again" / "prior"
    left.mkdir(parents=True)
    (left / "old").write_text("of an export that was killed")
    export_parts(find_parts(runs, {}), tmp_path / "again", GIGABYTE)
    assert not (tmp_path / "again/prior/old").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.slow
def test_the_command_line_from_export_to_sample(runs: Path, tmp_path: Path) -> None:
    hub, back, png = tmp_path / "hub", tmp_path / "back", tmp_path / "x.png"
    tapir("export", str(runs), str(hub), "--shard-gigabytes=0.00003")
    tapir("import", str(hub), str(back))
    flags = [f"--{name}={back / name}" for name in (*STAGES, "bpe")]
    tapir("sample", CAPTIONS[0], f"--out={png}", "--candidates=2", *flags)
    assert png.stat().st_size > 100
    assert "holds something already" in tapir("export", str(runs), str(hub), code=2)
    (hub / "tokenizer/tokenizer.json").unlink()
    assert "there is no" in tapir("import", str(hub), str(tmp_path / "y"), code=2)
    assert "above 0" in tapir("export", str(runs), "z", "--shard-gigabytes=nan", code=2)
    assert "tapir train" in tapir("export", str(tmp_path / "none"), "z", code=2)


def _checkpoint(run: Path, place: str, step: int, stage: str = "prior", ema: float = 0.0) -> None:
    """A checkpoint of the run's finished model, all weights times `step`, by two ranks."""
    model = open_model(run, stage)
    slices: list[StateSlice] = []
    for name, shape in model.shapes.items():
        flat = model.read(name).flatten() * step
        kinds = {"master": flat, "exp_avg": flat / 2, **({"ema": flat * ema} if ema else {})}
        half = len(flat) // 2
        for kind, data in kinds.items():
            for start, part in ((0, data[:half]), (half, data[half:])):
                slices.append(StateSlice(name=name, kind=kind, shape=shape, start=start, data=part))
    config = {"stage": stage, "model": model.config}
    facts = {"stage": stage, "step": step, "config": config, "task": model.facts}
    written: list[str] = []

    def gather(text: str) -> list[str]:
        if "sha256" not in text:
            return [text]  # the outcome
        written.append(text)
        return written

    for rank in (1, 0):  # rank 0 comes last: it has the other's rows
        write_checkpoint(open_store(place), f"step-{step}", slices[rank::2], facts, rank, gather)


def test_a_checkpoint_that_names_no_dvae_is_refused(runs: Path) -> None:
    run = _unfinished(runs / "prior")
    facts = {"stage": "prior", "step": 1, "config": {}}
    store = open_store(str(run / "checkpoints"))
    write_checkpoint(store, "step-1", [], facts, 0, lambda text: [text])
    with pytest.raises(InputError, match="an older Tapir wrote it; train on to the next"):
        load_prior(run)


def _unfinished(run: Path, to: str = "") -> Path:
    """A run folder beside `run` without a finished model."""
    folder = run.parent / "unfinished"
    folder.mkdir()
    config = {"stage": "prior", "loop": {"steps": 1}, "checkpoint": {"to": to}}
    (folder / "config.json").write_bytes(canonical_json(config))
    return folder


def _first(run: Path, step: int | None = None) -> torch.Tensor:
    return next(load_prior(run, step)[0].parameters()).detach()


@pytest.mark.seconds
@pytest.mark.parametrize("where", ["run", "folder", "s3"])
def test_a_run_that_has_not_ended_gives_its_newest_checkpoint(
    where: str, runs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    to = {"run": "", "folder": str(tmp_path / "elsewhere"), "s3": "s3://tapir-tests/newest"}[where]
    run = _unfinished(runs / "prior", to)
    with request.getfixturevalue("s3").credentials() if where == "s3" else nullcontext():
        for step in (2, 3):
            _checkpoint(runs / "prior", to or str(run / "checkpoints"), step)
        weight = _first(runs / "prior")
        assert _first(run).equal(3 * weight) and _first(run, 2).equal(2 * weight)
        assert load_prior(run)[2] == {**load_prior(runs / "prior")[2], "step": 3}
        with pytest.raises(InputError, match="no checkpoint of step 4; there are those of 2, 3"):
            load_prior(run, 4)


def test_the_average_is_taken_and_damage_passed_over(runs: Path) -> None:
    run = _unfinished(runs / "prior")
    place = str(run / "checkpoints")
    with pytest.raises(InputError, match=r"neither a finished prior in .* run `tapir train prior`"):
        load_prior(run)
    for step in (1, 2):
        _checkpoint(runs / "prior", place, step, ema=0.5)
    assert _first(run).equal(_first(runs / "prior"))
    model = open_model(run, "prior", 2)
    assert model.digest == sha256((runs / "prior" / "model.safetensors").read_bytes())
    _flip("rank-00001.safetensors")(run / "checkpoints/step-2")
    assert _first(run).equal(0.5 * _first(runs / "prior"))
    with pytest.raises(InputError, match="holds a prior, not a clip"):
        load_clip(run)


@pytest.mark.slow
def test_tokens_are_made_by_a_finished_dvae_alone(runs: Path, tmp_path: Path) -> None:
    run = _unfinished(runs / "dvae")
    _checkpoint(runs / "dvae", str(run / "checkpoints"), 1, "dvae")
    assert load_dvae(run)[1] == load_dvae(runs / "dvae")[1]
    flags = [f"--dvae={run}", f"--bpe={runs / 'bpe'}"]
    text = tapir("tokenize", str(tmp_path), str(tmp_path / "out"), *flags, code=2)
    assert "there is no finished dvae" in text


def test_an_unfinished_run_is_exported_as_if_it_had_ended(runs: Path, tmp_path: Path) -> None:
    run = _unfinished(runs / "prior")
    _checkpoint(runs / "prior", str(run / "checkpoints"), 1)
    export_parts(find_parts(runs, {"prior": run}), tmp_path / "hub", GIGABYTE)
    import_parts(tmp_path / "hub", tmp_path / "back")
    mine, expected = (path / "prior/model.safetensors" for path in (tmp_path / "back", runs))
    assert mine.read_bytes() == expected.read_bytes()
