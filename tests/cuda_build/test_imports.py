"""Every module imports, and every wheel's requirements are installed."""

import importlib.util
import pkgutil
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests.gpu.wheels import LIST, pinned_versions, pins
from tests.harness import ENVIRONMENT

PACKAGES = (
    *("core", "cluster", "checkpoint", "parallel", "models"),
    *("data_pipeline", "training", "planning", "generation", "serving", "workflow"),
    *("cli", "bench"),
)
_IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def _modules(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    below = pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")
    return [package, *(m.name for m in below if not m.name.endswith("__main__"))]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports(package: str) -> None:
    """In its own process, so that another package's imports do not help."""
    command = [sys.executable, "-P", "-c", _IMPORT, *_modules(package)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_need_of_a_wheel_is_installed() -> None:
    """In a matching version; of the peers, only parts with fewer requirements are imported."""
    missing = []
    for name in pinned_versions().keys() - pins(LIST).keys():
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            try:
                version = metadata.version(need.name)
            except metadata.PackageNotFoundError:
                version = ""
            if not (version and need.specifier.contains(version, prereleases=True)):
                missing.append(f"{name}: {text}, not {version or 'there'}")
    assert not missing
