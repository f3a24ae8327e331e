"""The small data sets and models that tests share, made once for all mutants."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.mutants.targets import ROOT, digest_of

MAKERS = ("core", "checkpoint", "parallel", "models", "data_pipeline", "training")
"""Packages that decide what is made."""


def make_data(cache: Path) -> None:
    """Make the data of tests/conftest.py once, and set the variable that names the folder."""
    folder = cache / f"made-{digest_of(MAKERS)}"
    if not (folder / "whole").exists():
        for old in cache.glob("made-*"):
            shutil.rmtree(old, ignore_errors=True)
        flags = ["tests/mutants/make_data.py", "-q", "-o", "addopts=", f"--basetemp={folder}"]
        command = [sys.executable, "-m", "pytest", *flags]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (folder / "whole").touch()
    os.environ["TAPIR_TEST_DATA"] = str(folder)
