"""docs/reliability.md's promises on a GPU: fp32 codes equal the CPU's, and runs repeat."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.storage.store import FolderStore
from data_pipeline.formats.manifest import TOKENS, read_manifest
from models.code_encoder import CodeReader
from models.config import DVAEConfig
from models.dvae import DVAE
from parallel.device import CPU, backends
from parallel.diagnostics.flight_recorder import last_collectives
from parallel.precision import set_numerics
from tests.chain import Chain

RACES = "does not have a deterministic implementation"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Chain:
    """Raw pairs and a tokenizer."""
    trained = Chain(folder=tmp_path_factory.mktemp("chain"), device=device)
    trained.pack()
    return trained


@pytest.mark.parametrize("stage", ["dvae", "clip", "prior"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    chain: Chain, stage: str, device: torch.device
) -> None:
    if stage == "prior":
        chain.tokenize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = chain.train(stage)
        digest = _digest(chain, stage)
        chain.forget(stage, 2)
        again = chain.train(stage)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in again] == [row[key] for row in rows]
    assert len(rows) == 4 and _digest(chain, stage) == digest
    assert not [str(w.message) for w in caught if RACES in str(w.message)]
    if stage == "prior":
        split = read_manifest(FolderStore(chain.folder / "tokens"), "train/", TOKENS)
        assert split.numerics[0]["deterministic"] and split.numerics[0]["conv"] == "highest"


def _digest(chain: Chain, stage: str) -> str:
    """sha256 of the weights."""
    digest: str = json.loads((chain.folder / stage / "model.json").read_bytes())["sha256"]
    return digest


@torch.no_grad()
def test_fp32_codes_are_those_of_the_cpu(device: torch.device) -> None:
    """At most one near tie in 16,384 codes differs; with TF32 many do."""
    dvae = DVAE(DVAEConfig(pixels=64, groups=3, width=32, codebook=512)).eval()
    pictures = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pictures = torch.nn.functional.avg_pool2d(pictures, 5, 1, 2)
    dvae.calibrate(pictures)
    set_numerics(CPU)
    expected = torch.cat([CodeReader(dvae).codes(part) for part in pictures.split(16)])
    reader = CodeReader(dvae.to(device))

    def wrong() -> int:
        parts = pictures.to(device).split(16)
        return int((torch.cat([reader.codes(part) for part in parts]).cpu() != expected).sum())

    set_numerics(device)
    assert expected.numel() == 16_384 and len(expected.unique()) > 100
    assert wrong() <= 1
    if device.type == "cuda":
        set_numerics(device, "medium")
        loose = wrong()
        set_numerics(device)
        assert loose > 1


def test_the_flight_recorder_tells_of_the_devices_collectives(
    device: torch.device, tmp_path: Path
) -> None:
    dist.init_process_group(
        backends(device), init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        dist.all_reduce(torch.ones(3, device=device))
        dist.broadcast(torch.ones(5, device="cpu"), 0)
        names = [entry["profiling_name"] for entry in last_collectives()["entries"]]
    finally:
        dist.destroy_process_group()
    kind = "nccl" if device.type == "cuda" else "gloo"
    assert names[-2:] == [f"{kind}:all_reduce", "gloo:broadcast"]
