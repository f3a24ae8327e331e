"""A command writes to a new folder or its own: nothing is mixed, nothing overwritten."""

import json
import threading
from pathlib import Path

import pytest

from cli.data import pack
from cli.evaluate import evaluate, overlap, score
from cli.export import import_
from cli.sample import demo
from cli.tokenize import tokenize
from core.errors import InputError
from core.files.atomic import held
from core.files.out_folder import owner_of, refuse_others_folder
from training.config import BPETrain, DVAETrain
from training.launch import train_stage
from training.tokenizer import train_tokenizer

FILES = {
    "a data set": "train/manifest.json",
    "train dvae": "model.json",
    "train prior": "config.json",
    "train bpe": "tokenizer.json",
    "score": "scores.json",
    "evaluate": "candidates.json",
    "overlap": "overlap.json",
    "submit": "chain.json",
    "demo": "seconds.json",
}


def folder_of(path: Path, owner: str) -> Path:
    """The note in a folder that a command wrote."""
    file = path / FILES[owner]
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"stage": owner.removeprefix("train ")}))
    return path


@pytest.mark.parametrize("owner", FILES)
def test_every_command_refuses_the_folder_of_another(owner: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "x", owner)
    writes = {
        "a data set": [lambda: pack(["shapes", str(path)]), lambda: tokenize(["raw", str(path)])],
        "train dvae": [lambda: train_stage("dvae", DVAETrain(out=path))],
        "train bpe": [lambda: train_tokenizer(BPETrain(out=path))],
        "score": [lambda: score(["coco:none", f"--out={path}"])],
        "evaluate": [lambda: evaluate(["none", f"--out={path}"])],
        "overlap": [lambda: overlap(["raw", "none", f"--out={path}"])],
        "demo": [lambda: demo(["--size=mini", f"--out={path}"])],
        "import": [
            lambda: import_([str(tmp_path), str(path)]),
            lambda: import_([str(tmp_path), str(path), "--from=openai-dvae"]),
        ],
    }
    named = "holds a data set" if owner == "a data set" else f"holds what `tapir {owner}` wrote"
    for mine, commands in writes.items():
        for command in commands if mine != owner else ():
            is_finished = mine == "import" and FILES[owner] == "model.json"
            text = "holds a finished model already" if is_finished else named
            with pytest.raises(InputError, match=text) as raised:
                command()
            assert raised.value.exit_code == 2
    refuse_others_folder(path, owner)


@pytest.mark.parametrize("mine", ["evaluate", "score", "overlap"])
def test_pictures_are_not_mixed_with_run_folders(mine: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "runs" / "raw", "a data set")
    refuse_others_folder(tmp_path / "runs", mine)
    folder_of(tmp_path / "runs" / "prior", "train prior")
    folder_of(tmp_path / "runs" / "dvae", "train dvae")
    commands = {"evaluate": evaluate, "score": score, "overlap": overlap}
    data = ["raw", "none"] if mine == "overlap" else ["coco:none"]
    with pytest.raises(InputError, match=r"holds the run folders dvae, prior, and .*/runs/"):
        commands[mine]([*data, f"--out={tmp_path / 'runs'}"])
    refuse_others_folder(tmp_path / "runs" / "new", mine)
    (tmp_path / "runs" / FILES[mine]).touch()
    refuse_others_folder(tmp_path / "runs", mine)


def test_damaged_notes_and_new_folders_belong_to_nobody(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", "no JSON"):
        (tmp_path / "config.json").write_text(text)
        assert owner_of(tmp_path) == ""
    assert owner_of(tmp_path / "new") == ""
    (tmp_path / "tokenizer.json").touch()
    assert owner_of(tmp_path) == "train bpe"


def test_one_tokenizer_is_learned_in_a_folder_at_a_time(tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "bpe"
    texts.write_text("a small red circle\n" * 20)
    settings, errors = BPETrain(texts=texts, out=out, vocabulary=270), list[str]()

    def learn() -> None:
        try:
            train_tokenizer(settings)
        except InputError as error:
            errors.append(str(error))

    with held(out, "train bpe"):
        second = threading.Thread(target=learn)
        second.start()
        second.join()
    assert "another train bpe is working" in errors[0] and not (out / "tokenizer.json").exists()
    for _ in range(2):  # the same one is written again
        train_tokenizer(settings)
    first = (out / "tokenizer.json").read_bytes()
    texts.write_text("two large blue squares\n" * 20)
    with pytest.raises(InputError, match="holds another tokenizer, of 267 entries"):
        train_tokenizer(settings)
    assert (out / "tokenizer.json").read_bytes() == first
    (out / "tokenizer.json").write_text("damaged")
    train_tokenizer(settings)


def test_a_training_run_takes_no_file_and_no_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"file is a file, and .* must be a folder") as raised:
            train_stage("dvae", DVAETrain(out=out))
        assert raised.value.exit_code == 2
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "slurm-1.log").touch()
    refuse_others_folder(photos, "train dvae")
    (photos / "b.JPG").touch()
    (photos / "c.tar").touch()
    with pytest.raises(InputError, match=r"photos holds b.JPG, .* e.g. --out runs/dvae"):
        refuse_others_folder(photos, "train dvae")
    refuse_others_folder(photos, "evaluate")
    (photos / "config.json").write_text('{"stage": "dvae"}')
    refuse_others_folder(photos, "train dvae")


def test_an_import_takes_no_file_no_pictures_and_not_the_folder_that_it_reads(
    tmp_path: Path,
) -> None:
    source = tmp_path / "vq"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"foreign")
    for given in (source, source / "model.safetensors"):
        with pytest.raises(InputError, match="vq holds the files to import; give a new folder"):
            import_([str(given), str(source), "--from=llamagen"])
    with pytest.raises(InputError, match=r"is a file, and .* must be a folder"):
        import_([str(source), str(source / "model.safetensors")])
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "b.jpg").touch()
    with pytest.raises(InputError, match=r"photos holds b.jpg, .* e.g. runs/vqgan"):
        import_([str(source), str(photos)])
    assert [each.name for each in photos.iterdir()] == ["b.jpg"]
    assert (source / "model.safetensors").read_bytes() == b"foreign"
