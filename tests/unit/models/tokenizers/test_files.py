"""Files of weights of other projects: what is read, what is refused, and that nothing is run."""

import os
import sys
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
    before = torch.serialization.get_safe_globals()
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    assert read_weights(path)["encoder.x"].equal(weights["encoder.x"])
    assert torch.serialization.get_safe_globals() == before


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_what_a_pickle_would_run_is_named_and_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "last.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {"x": torch.ones(1)}, "callbacks": Evil(mark)}, path)
    with pytest.raises(InputError, match=r"refers to (posix|os)\.mkdir, which loading"):
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
