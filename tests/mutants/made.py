"""The small data sets and models that tests share, made once for all mutants."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.mutants.targets import PACKAGES, ROOT, digest_of


def make_data(cache: Path) -> None:
    """Make what tests/conftest.py would make in every session, and say where it is."""
    folder = cache / f"made-{digest_of(PACKAGES)}"
    if not (folder / "whole").exists():
        for old in cache.glob("made-*"):
            shutil.rmtree(old, ignore_errors=True)
        script = "tests/mutants/make_data.py"
        subprocess.run(
            [sys.executable, "-m", "pytest", script, "-q", "-o", "addopts=", f"--basetemp={folder}"],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (folder / "whole").touch()
    os.environ["TAPIR_TEST_DATA"] = str(folder)
