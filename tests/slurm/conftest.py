"""A private Slurm for the tests of this folder."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Slurm, private_slurm


def refuse_without_slurm() -> None:
    """Skip the test if this machine cannot run a Slurm."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        pytest.skip("no Slurm: apt install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("a private Slurm needs root")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of two cores."""
    refuse_without_slurm()
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    with private_slurm(Path(folder) / "s") as cluster:
        yield cluster
