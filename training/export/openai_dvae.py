"""Exports and imports the dVAE in the layout of OpenAI's public `dall_e` package.

The folder holds encoder.safetensors and decoder.safetensors with the parameters of the package's
Encoder and Decoder under its names. OpenAI's published pickles are not read: loading a pickle can
execute code. Source: openai/DALL-E, dall_e/encoder.py and decoder.py.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from core.config import check
from core.errors import ConfigError, InputError
from core.files.atomic import write_atomic
from models.config import DVAEConfig
from models.dvae import build_decoder, build_encoder
from training.export.files import refuse_import_into
from training.export.weights import read_model, write_model

PARTS = ("encoder", "decoder")
GROUPS, BOTTLENECK = 4, 4
_PREFIX = "dvae.dvae."
_OURS = re.compile(r"g(\d+)b(\d+)\.(identity|convs\.(\d+))\.(weight|bias)")
_THEIRS = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.(id_path|res_path\.conv_(\d+))\.([wb])")
_ENDS = {"input.": "blocks.input.", "output.": "blocks.output.conv."}
_KINDS = {"weight": "w", "bias": "b"}


def export_dvae(run: Path, out: Path) -> list[Path]:
    """Write a finished dVAE in the package's layout; returns the files.

    Raises: ConfigError if the package does not support these sizes.
    """
    body, tensors = read_model(run, "dvae")
    problems = _foreign_sizes(DVAEConfig(**body["config"]))
    if problems:
        raise ConfigError(
            f"{run} does not fit the dall_e package: {'; '.join(problems)}; train with those "
            "settings, e.g. the preset paper_dvae"
        )
    written = []
    for part in PARTS:
        prefix = f"{_PREFIX}{part}."
        named = {
            _theirs(name.removeprefix(prefix)): value.contiguous()
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        written.append(out / f"{part}.safetensors")
        write_atomic(written[-1], save(named))
    return written


def import_dvae(folder: Path, out: Path, pixels: int) -> DVAEConfig:
    """Convert a folder of the package's layout to a finished dVAE; returns its sizes.

    Raises: InputError if the folder is of another kind, or `out` is not new; ConfigError if
    `pixels` does not fit.
    """
    refuse_import_into(out, folder)
    tensors = {
        f"{_PREFIX}{part}.{_ours(name, folder)}": value.float()
        for part in PARTS
        for name, value in _read(folder / f"{part}.safetensors").items()
    }
    config = _sizes(tensors, folder, pixels)
    check(config.problems())
    _refuse_misfits(config, tensors, folder)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    facts = {"imported": "openai-dvae"}
    write_model(out, "dvae", vars(config), facts, shapes, tensors.__getitem__)
    return config


def _foreign_sizes(config: DVAEConfig) -> list[str]:
    required = {
        **{"quantizer": "gumbel", "groups": GROUPS, "bottleneck": BOTTLENECK},
        **{"gain": 0.0, "epsilon": 0.1},
    }
    return [
        f"model.{name} must be {value}, not {getattr(config, name)}"
        for name, value in required.items()
        if getattr(config, name) != value
    ]


def _refuse_misfits(config: DVAEConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise InputError unless these are exactly the tensors of a dVAE of these sizes, finite."""
    with torch.device("meta"):
        parts = {"encoder": build_encoder(config), "decoder": build_decoder(config)}
    expected = {
        f"{_PREFIX}{part}.{name}": parameter.shape
        for part, network in parts.items()
        for name, parameter in network.named_parameters()
    }
    shapes = {name: value.shape for name, value in tensors.items()}
    if wrong := sorted(n for n in {*expected, *shapes} if expected.get(n) != shapes.get(n)):
        name = wrong[0]
        raise InputError(
            f"{folder} holds no encoder and decoder of one dVAE: {len(wrong)} tensors do not fit, "
            f"such as {name.removeprefix(_PREFIX)}, {_shape(shapes.get(name))} instead of "
            f"{_shape(expected.get(name))}; give the two files of one dVAE"
        )
    if broken := sorted(n for n, value in tensors.items() if not value.isfinite().all()):
        raise InputError(f"{folder}: {broken[0].removeprefix(_PREFIX)} holds values like NaN")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape is not None else "missing"


def _theirs(name: str) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(ours):
            return theirs + _KINDS[name.removeprefix(ours)]
    match = _OURS.fullmatch(name)
    assert match, f"the dVAE has no parameter {name}"
    group, block, path, conv, kind = match.groups()
    where = "id_path" if path == "identity" else f"res_path.conv_{int(conv) + 1}"
    return f"blocks.group_{int(group) + 1}.block_{int(block) + 1}.{where}.{_KINDS[kind]}"


def _ours(name: str, folder: Path) -> str:
    kinds = {short: long for long, short in _KINDS.items()}
    for ours, theirs in _ENDS.items():
        if name.startswith(theirs) and name.removeprefix(theirs) in kinds:
            return ours + kinds[name.removeprefix(theirs)]
    match = _THEIRS.fullmatch(name)
    if not match:
        raise InputError(f"{folder} is not a dVAE of the dall_e package: it has a tensor {name!r}")
    group, block, path, conv, kind = match.groups()
    where = "identity" if path == "id_path" else f"convs.{int(conv) - 1}"
    return f"g{int(group) - 1}b{int(block) - 1}.{where}.{kinds[kind]}"


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(
            f"there is neither {path} nor a model_index.json; save the state_dict() of the "
            "package's Encoder and Decoder there with "
            "safetensors.torch.save_file (pickles are not loaded)"
        )
    try:
        return load(path.read_bytes())
    except Exception as error:  # the library raises nothing more precise
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); write or copy it again"
        ) from error


def _sizes(tensors: dict[str, Tensor], folder: Path, pixels: int) -> DVAEConfig:
    """Infer the sizes from the tensors' shapes.

    Raises: InputError if the input layers are missing.
    """
    ends = (f"{_PREFIX}encoder.input.weight", f"{_PREFIX}decoder.input.weight")
    if not all(name in tensors and tensors[name].dim() == 4 for name in ends):
        raise InputError(f"{folder} lacks the input layers of the dall_e package's dVAE")
    names = [name for name in tensors if name.startswith(f"{_PREFIX}encoder.g0b")]
    return DVAEConfig(
        pixels=pixels,
        width=tensors[ends[0]].shape[0],
        groups=GROUPS,
        blocks=len({name.split(".")[3] for name in names}),
        bottleneck=BOTTLENECK,
        gain=0.0,
        codebook=tensors[ends[1]].shape[1],
        code_width=tensors[ends[1]].shape[0],
        min_log_scale=-20.0,
        init="paper",
    )
