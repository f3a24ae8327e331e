"""The Inception network of published FIDs, from weights in a local file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from core.errors import InputError
from core.files.atomic import sha256
from models.third_party import foreign_module
from parallel.device import CPU

_TOGETHER = 32
_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_MODULE = "torch_fidelity.feature_extractor_inceptionv3"
_HOW = (
    f"get {_WEIGHTS} from the releases of torch-fidelity (or pt_inception-2015-12-05-6726825d.pth "
    'from those of pytorch-fid) and turn it into safetensors:\n  python -c "import torch, '
    "safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load("
    f"'{_WEIGHTS}', weights_only=True).items()}}, 'inception.safetensors')\""
)

Features = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(n, D) features and (n, C) logits."""


class Inception:
    """The Inception network of published FIDs; it resizes to 299 pixels itself."""

    label = "FID and IS (Inception features)"
    proxy = False

    def __init__(self, path: Path, device: torch.device = CPU) -> None:
        tensors, digest = _read(path)
        self.name = f"inception {digest}"
        self._device = device
        self._network = _built(tensors, path).to(device)

    @torch.no_grad()
    def __call__(self, pictures: NDArray[np.uint8]) -> Features:
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        rows = [self._network(part.to(self._device)) for part in pixels.split(_TOGETHER)]
        features, logits = (torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True))
        return features, logits


def refuse_other_files(path: Path) -> None:
    """Raise InputError unless there is a safetensors file at a path; reads its header alone."""
    if not path.is_file():
        raise InputError(f"there are no Inception weights at {path}; {_HOW}")
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a safetensors file, and no pickle is loaded; {_HOW}"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    refuse_other_files(path)
    data = path.read_bytes()
    return load(data), sha256(data)


def _built(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """torch-fidelity's network with these weights: it would download a pickle when it is made."""
    module: Any = foreign_module(_MODULE)
    download = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: tensors
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = module.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"]
            )
            return network
    except RuntimeError as error:
        first = str(error).splitlines()[1:] or [str(error)]
        raise InputError(
            f"{path} holds other weights than this Inception's ({first[0].strip()[:100]}); {_HOW}"
        ) from error
    finally:
        module.load_state_dict_from_url = download
