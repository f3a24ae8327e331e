"""Networks of other packages (open_clip, torch-fidelity, diffusers), which import torchvision."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from core.errors import ConfigError

_NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []


def foreign_module(name: str, mend: str = "install what requirements.txt names") -> ModuleType:
    """Import a module that imports torchvision, whose compiled part may not fit this torch.

    Package registries hold torchvision for CUDA alone. With a CPU torch its compiled operators
    cannot be loaded, and its import fails because two of them are undeclared: they are declared
    here, and never called. `mend` is the fix in the message.
    Raises: ConfigError if the module is not installed.
    """
    if not _declared and torch.version.cuda is None:
        _declare_operators()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} cannot be imported ({error}); {mend}") from error


def _declare_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            library.define(_NMS)
            library.define(f"q{_NMS}")
            _declared.append(library)
