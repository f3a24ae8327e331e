"""Tensors from other projects' files, without running anything that is in them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from core.errors import InputError

SAFETENSORS = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
INERT = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
"""Packages whose classes in a checkpoint are replaced by inert ones: callbacks and settings."""
_INERT_NAMES = ("typing.Any", "collections.defaultdict")
"""What omegaconf's settings refer to."""
_PART = 1 << 24
"""Bytes of a record that are compared with its CRC-32 together."""
_HOLDERS = ("ema", "model", "state_dict")
"""Keys that hold the weights of a checkpoint; the first that is there counts."""


class Inert:
    """Takes the place of a class in a pickle; keeps nothing and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def weights_file(path: Path) -> Path:
    """The file of weights that is `path`, or the only one in the folder `path`.

    Raises: InputError if there is none, or more than one.
    """
    named = weights_files(path)
    if not named:
        endings = ", ".join((SAFETENSORS, *PICKLES))
        raise InputError(f"{path} is or holds no file of weights ({endings}); give one")
    if len(named) > 1:
        names = ", ".join(p.name for p in named)
        raise InputError(f"{path} has several files of weights ({names}); give one of them")
    return named[0]


def weights_files(path: Path) -> list[Path]:
    """The files of weights that are `path`, or in the folder `path`."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [p for p in inside if p.suffix in (SAFETENSORS, *PICKLES)]


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of weights, by name, in fp32 on the CPU.

    Pickles are read by torch.load(weights_only=True), with `Inert` for classes of INERT.
    Raises: InputError if the file is damaged, or refers to anything else.
    """
    try:
        if path.suffix == SAFETENSORS:
            body: Any = load_file(path, device="cpu")
        else:
            _verify_records(path)
            body = _unpickled(path)
    except InputError:
        raise
    except Exception as error:  # damaged pickles raise whatever the damage leads to
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise InputError(f"{path} is no whole file of weights ({reason}); copy it again") from error
    tensors = _held(body, path)
    if not tensors:
        raise InputError(f"{path} holds no tensors; give a checkpoint of a tokenizer's weights")
    return tensors


def _verify_records(path: Path) -> None:
    """Compare the records of a torch file with their CRC-32s, which torch.load does not read.

    Records that torch.save wrote without CRC-32 have 0 there.
    Raises: InputError naming a record that differs.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as records:
        for record in records.infolist():
            if not record.CRC:
                continue
            try:
                with records.open(record) as part:
                    while part.read(_PART):
                        pass
            except (zipfile.BadZipFile, EOFError) as error:
                raise InputError(
                    f"{path} is damaged: {record.filename} differs from its CRC-32; copy it again"
                ) from error


def _unpickled(path: Path) -> Any:
    with torch.serialization.safe_globals(_stand_ins(path)):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _stand_ins(path: Path) -> list[Any]:
    """An inert class for each global of a pickle that may have one."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except ValueError as error:
        raise InputError(
            f"{path} is damaged, or in the format of torch before 1.6, which is not read; save it "
            "by a newer torch, or as safetensors"
        ) from error
    foreign = [n for n in names if not n.startswith(INERT) and n not in _INERT_NAMES]
    if foreign:
        raise InputError(
            f"{path} refers to {', '.join(sorted(foreign)[:3])}: code that would run when it is "
            "loaded; save its state_dict alone, or as safetensors"
        )
    return [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]


def _held(body: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without what is beside its weights."""
    if not isinstance(body, Mapping):
        return {}
    for holder in _HOLDERS:
        if isinstance(body.get(holder), Mapping):
            body = body[holder]
            break
    return {
        str(name): _dense(value, f"{path}: {name}")
        for name, value in body.items()
        if isinstance(value, Tensor)
    }


def _dense(value: Tensor, where: str) -> Tensor:
    """A tensor's values, fp32 if they are floats.

    Raises: InputError for tensors that hold other things than one number an element.
    """
    is_odd = value.is_quantized or value.is_complex() or value.is_meta
    if is_odd or value.layout != torch.strided:
        kind = value.dtype if value.layout == torch.strided else value.layout
        place = ", without values" if value.is_meta else ""
        raise InputError(
            f"{where} is a tensor of {kind}{place}; save the weights as dense tensors of floats"
        )
    try:
        return value.detach().float() if value.is_floating_point() else value
    except RuntimeError as error:
        raise InputError(f"{where} is {value.dtype}; save the weights in fp32") from error
