"""Two machines with two ranks each, as network namespaces: the losses of one machine."""

import os
import shutil
from pathlib import Path

import pytest

from bench.support.machines import two_machines
from tests.harness import ROOT, processes_with, rows_of, tapir

FLAGS = [
    "--loop.steps=4",
    "--loop.global-batch-size=32",
    "--loop.log-every=1",
    "--loop.validation-samples=32",
    "--engine.precision=fp32",
    "--engine.matmul-precision=highest",
    "--engine.zero-stage=3",
    "--mesh.data=4",
    "--mesh.nodes=2",
    "--compress.rank=auto",
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="namespaces need: apt install iproute2")
@pytest.mark.skipif(os.getuid() != 0, reason="network namespaces need root: run as root")
def test_two_machines_train_as_one_does(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 100 Mbit/s the advisor switches compression on; on loopback of one machine, off or on."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["tapir", "train", "prior", "tiny", f"--data={tokens}"]
    with two_machines() as machines:
        machines.shape(100)
        out = tmp_path / "two"
        outputs = machines.run([*command, f"--out={out}", *FLAGS], 2, 29_650)
    assert "pays below" in outputs[0] and "compression auto: rank 43" in outputs[0]
    single = tmp_path / "one"
    flags = [*FLAGS[:-1], "--compress.rank=43"]
    tapir(*command[1:], f"--out={single}", *flags)
    assert [row["loss"] for row in rows_of(out)] == [row["loss"] for row in rows_of(single)]
    assert not processes_with(str(out))
