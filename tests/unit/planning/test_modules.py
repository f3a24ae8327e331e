"""`tapir plan --estimate`: bytes of a module are those of a live run, and meshes share them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cli.plan import plan
from core.errors import ConfigError, InputError
from planning.estimate.hardware import hardware_of
from planning.estimate.kernels import flops
from planning.modules.estimate import DataMesh, estimate_module, estimate_recorded, mesh_of
from planning.modules.record import record
from tests.harness import tapir

H100 = hardware_of("h100")


class Tagger(nn.Module):
    """Embeddings, a transformer layer, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, 128)
        self.block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.head = nn.Linear(128, 2000)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.block(self.table(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def mlp() -> tuple[nn.Module, Any]:
    layers = [nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.LayerNorm(512)]
    return nn.Sequential(*layers), torch.zeros(256, 512, device="cpu")


def tagger() -> tuple[nn.Module, Any]:
    return Tagger(), {"ids": torch.zeros(8, 64, dtype=torch.int64, device="cpu")}


def pictures() -> tuple[nn.Module, Any]:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(65536, 10)]
    return nn.Sequential(*layers), (torch.zeros(16, 3, 32, 32, device="cpu"),)


def deep() -> tuple[nn.Module, Any]:
    layers = [part for _ in range(6) for part in (nn.Linear(384, 384), nn.Tanh())]
    return nn.Sequential(*layers), [torch.zeros(512, 384, device="cpu")]


MODULES = {"mlp": mlp, "tagger": tagger, "pictures": pictures, "deep": deep}


def live_peak(build: Callable[[], tuple[nn.Module, Any]]) -> int:
    """Most bytes that the CPU's allocator had given out in two real steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        module, batch = build()
        optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
        for _ in range(2):
            called = module(**batch) if isinstance(batch, dict) else module(*_listed(batch))
            loss = called if called.numel() == 1 else called.float().mean()
            loss.backward()
            optimizer.step()
            del loss, called
            optimizer.zero_grad()
    events = seen.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _listed(batch: Any) -> Any:
    return batch if isinstance(batch, tuple | list) else (batch,)


@pytest.mark.parametrize("name", MODULES)
def test_peak_bytes_are_those_of_a_live_run(name: str) -> None:
    """Within 5%."""
    done = record(MODULES[name], half=False)
    assert done.peak == pytest.approx(live_peak(MODULES[name]), rel=0.05)


def test_kernels_and_states_by_hand() -> None:
    done = record(mlp, half=False)
    weights = 2 * 512 * 2048
    assert done.elements == weights + 2048 + 512 + 2 * 512
    assert done.parameters == done.gradients == 4 * done.elements
    assert done.moments == 8 * done.elements
    assert flops(done.forward) == 2.0 * 256 * weights
    # the batch needs no gradient
    assert flops(done.backward) == 2.0 * 256 * (weights + 512 * 2048)
    halves = [k for k in record(mlp, half=True).forward if k.inner]
    assert len(halves) == 2 and all(k.half for k in halves) and not done.forward[0].half


def test_shards_divide_states_and_cost_traffic() -> None:
    done = record(tagger, half=False)
    slow = replace(H100, network=1e6)
    alone, copies, shards, groups = (
        estimate_recorded(done, mesh, slow, half=False)
        for mesh in (
            DataMesh(),
            DataMesh(data=64),
            DataMesh(data=64, shards=64),
            DataMesh(data=64, shards=8),
        )
    )
    assert alone.peak == done.peak and alone.exposed == 0.0
    assert copies.bytes_["buffers"] == done.gradients
    assert shards.bytes_["optimizer"] == -(-done.moments // 64)
    assert groups.bytes_["optimizer"] == -(-done.moments // 8)
    assert alone.seconds < groups.seconds < copies.seconds
    assert alone.fits(H100) and not alone.fits(replace(H100, memory=H100.context + 1))


@pytest.mark.parametrize("text", ["tensor=2", "data=x", "data"])
def test_other_meshes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="data=64,shards=8"):
        mesh_of(text, 0)
    assert mesh_of("data=8,shards=4", 0) == DataMesh(data=8, shards=4)
    assert DataMesh(data=8, shards=3).problems() and mesh_of("", 4) == DataMesh(data=4)


def test_files_that_build_nothing_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("import torch\ndef bad(): return torch.nn.Linear(2, 2), None\nvalue = 3\n")
    for target, words in (
        (f"{file}:bad", "must return"),
        (f"{file}:value", "no function"),
        (f"{tmp_path / 'none.py'}:build", "a file that exists"),
        (str(file), "a file that exists"),
    ):
        with pytest.raises(InputError, match=words):
            estimate_module(target, DataMesh(), H100, half=False)


@pytest.mark.world
def test_the_command_says_whether_it_fits(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Linear(64, 64), torch.zeros(8, 64, device='cpu')\n"
    )
    flags = ["--estimate", f"{file}:build", "--mesh", "data=16,shards=8", "--json"]
    printed = tapir("plan", *flags).splitlines()
    body = json.loads(next(line for line in printed if line.startswith("{")))
    assert body["fits"] and body["mesh"] == {"data": 16, "shards": 8}
    assert "it fits" in "\n".join(printed)
    with pytest.raises(ConfigError, match="no use for preset"):
        plan(["tiny", *flags])
