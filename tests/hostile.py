"""A folder of files named like our modules or Python's; each leaves a mark if it runs."""

from pathlib import Path

from tapir import PACKAGES
from tests.harness import ENVIRONMENT

_MODULES = (
    *("tests", "bench", "profile", "random", "json", "types", "logging"),
    *("torch", "numpy", "yaml", "boto3", "tyro"),
)
_FOLDERS = ("tapir", "multiprocessing", "importlib", "sitecustomize", "training", "cluster")
"""Further names that a user's own files have."""


def hostile_folder(folder: Path, only_ours: bool = False) -> Path:
    """Fill a folder with modules that leave a file when they run, and with a clone of Tapir.

    `only_ours`: without Python's names and the clone, which break any program in PYTHONPATH.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = (
        "import os; open(os.path.join({!r}, 'ran-' + __name__), 'w'); raise ImportError('foreign')"
    )
    text = code.format(str(folder))
    for name in PACKAGES if only_ours else (*PACKAGES, *_MODULES):
        (folder / f"{name}.py").write_text(text)
    for name in ("models",) if only_ours else ("models", *_FOLDERS):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


def foreign_code(folder: Path) -> list[str]:
    """Names of its modules that ran."""
    return sorted(path.name.removeprefix("ran-") for path in folder.glob("ran-*"))


def bare() -> dict[str, str]:
    """The environment of a user who has installed Tapir."""
    return {k: v for k, v in ENVIRONMENT.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
