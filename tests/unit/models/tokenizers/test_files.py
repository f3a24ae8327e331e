"""Files of weights of other projects: what is read, what is refused, and that nothing is run."""

import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from core.errors import InputError
from models.tokenizers.files import read_weights, weights_file


def lightning_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class with the name of Lightning's callback, which is importable while files are made."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = {"score": torch.ones(1)}

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    vars(sys.modules[name])["ModelCheckpoint"] = ModelCheckpoint
    return ModelCheckpoint


def test_callbacks_of_a_lightning_checkpoint_are_inert(tmp_path: Path) -> None:
    weights, path = {"encoder.x": torch.arange(3.0)}, tmp_path / "last.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        callback = lightning_class(patch)
        body = {"state_dict": weights, "callbacks": {callback: {"best": 1}}, "kept": callback()}
        torch.save(body, path)
    assert "pytorch_lightning" not in sys.modules
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    assert read_weights(path)["encoder.x"].equal(weights["encoder.x"])
    assert set(torch.serialization.get_safe_globals()) == before


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_what_a_pickle_would_run_is_named_and_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "last.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {"x": torch.ones(1)}, "callbacks": Evil(mark)}, path)
    with pytest.raises(InputError, match=r"refers to (posix|os)\.mkdir: code that would run"):
        read_weights(path)
    assert not mark.exists()


def test_averaged_weights_come_before_the_others(tmp_path: Path) -> None:
    path = tmp_path / "vq.pt"
    torch.save({"model": {"x": torch.zeros(1)}, "ema": {"x": torch.ones(1).half()}}, path)
    read = read_weights(path)["x"]
    assert read.dtype == torch.float32 and read.item() == 1


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no file of weights"):
        weights_file(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="holds no file of weights"):
        weights_file(tmp_path / "a.json")
    torch.save({"step": 3}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="holds no tensors"):
        read_weights(weights_file(tmp_path))
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no whole file of weights"):
        read_weights(tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"1234567")
    with pytest.raises(InputError, match=r"several files of weights \(a.pt, b.safetensors\)"):
        weights_file(tmp_path)
    with pytest.raises(InputError, match="no whole file of weights"):
        read_weights(tmp_path / "b.safetensors")


def test_a_record_that_differs_from_its_crc_is_named(tmp_path: Path) -> None:
    path, weights = tmp_path / "last.ckpt", torch.arange(3000.0)
    torch.save({"state_dict": {"x": weights}}, path)
    assert read_weights(path)["x"].equal(weights)
    body = bytearray(path.read_bytes())
    middle = body.index(weights[1500:1516].numpy().tobytes())
    body[middle : middle + 64] = bytes(255 - each for each in body[middle : middle + 64])
    path.write_bytes(body)
    with pytest.raises(InputError, match=r"last.ckpt is damaged: last/data/0 differs from its CRC"):
        read_weights(path)


def test_records_without_crcs_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"x": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert read_weights(tmp_path / "a.pt")["x"].equal(torch.ones(3))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.eye(3).to_sparse(), "x is a tensor of torch.sparse_coo; save the weights as dense"),
        (torch.ones(2, dtype=torch.complex64), "x is a tensor of torch.complex64"),
        (torch.ones(2, device="meta"), "x is a tensor of torch.float32, without values"),
    ],
)
def test_tensors_that_are_not_dense_floats_are_named(
    value: torch.Tensor, text: str, tmp_path: Path
) -> None:
    torch.save({"x": value}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=text):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "damage", [b"(", b"\x80\x02}X\x05\x00\x00\x00ab", b"\x80\x02K\x01(K\x02s."]
)
def test_whatever_a_damaged_pickle_raises_is_a_sentence(damage: bytes, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "whole.pt")
    whole, path = zipfile.ZipFile(tmp_path / "whole.pt"), tmp_path / "a.pt"
    with whole, zipfile.ZipFile(path, "w") as made:
        for name in whole.namelist():
            made.writestr(name, damage if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(InputError, match=r"a.pt (is no whole file of weights|is damaged)"):
        read_weights(path)
