"""A prior sharded over tensor ranks and stages draws the samples of one process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.config import to_json
from generation.config import DrawSettings
from generation.sampling.batches import Need
from generation.sampling.decoder import Decoder
from generation.sampling.load_prior import load_local_prior
from generation.sampling.sampler import Sampler
from generation.sampling.speculative import SpeculativeSampler
from models.config import PriorConfig
from parallel.config import MeshConfig
from parallel.mesh import Mesh, build_mesh
from parallel.world import join_world, leave_world
from tests.harness import run_world
from tests.unit.models.test_models import CONFIG, prior_batch, prior_logits, trained_like
from training.export.weights import write_model

MASKS = [(3, 3), (4, 11), (6, 5)]
"""(layers, kernel): each with rows, columns and a convolution."""
MODERN = replace(
    CONFIG, norm="rms", qk_norm=True, positions="rotary", mlp="gated", tied=True, layers=5
)
GUIDED = DrawSettings(guidance=2.0, top_p=0.9)


def write_prior(folder: Path, config: PriorConfig) -> nn.ModuleDict:
    """A prior whose weights are far from zero, as a finished model."""
    layers = trained_like(config)
    tensors = dict(layers.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in tensors.items()}
    write_model(folder, "prior", to_json(config), {}, shapes, lambda name: tensors[name].detach())
    return layers


def draws(decoder: Decoder, settings: DrawSettings, free: float = 1e12) -> list[Any]:
    """Codes of 3 captions with 4 candidates each, given `free` bytes of memory."""
    kind = Sampler if decoder.caches.together == 1 else SpeculativeSampler
    keys = [[(7, f"caption {i}", j) for j in range(4)] for i in range(3)]
    codes = torch.full((3, 4, CONFIG.image_length), -1)
    sampler = kind(decoder, lambda device: int(free))
    for drawn in sampler.draw(prior_batch()["text"], keys, settings):
        codes[drawn.captions, drawn.candidates] = drawn.codes
    return codes.tolist()


def given_logits(decoder: Decoder) -> list[Any] | None:
    """Logits of every position after 3 that are given, then the last one's canonical ones.

    None on stages before the last.
    """
    batch = prior_batch()
    lane = decoder.start(batch["text"], batch["image"][:, :3], 1)
    rows = [
        decoder.next(lane, position, batch["image"][:, position - 1])
        for position in range(3, CONFIG.image_length)
    ]
    canonical = decoder.canonical_logits(batch["text"], batch["image"])
    if canonical is None:
        return None
    return torch.stack([*rows, canonical], 1).tolist()  # type: ignore[list-item]


def decode(payload: str) -> None:
    """A rank: logits and draws with its parts of some priors."""
    body = json.loads(payload)
    world = join_world()
    mesh = build_mesh(MeshConfig(tensor=body["tensor"], pipeline=body["pipeline"]), world)
    results = []
    for prior in body["priors"]:
        decoder = Decoder(load_local_prior(Path(prior), None, mesh)[0])
        need = Need(caches=decoder.caches, captions=3, candidates=4, streams=2, lanes=2)
        free = need.bytes(3) / 0.9 + 1 if world.rank == 2 else 1e12
        assert need.most(12, int(free)) == (3 if world.rank == 2 else 12)
        likely = draws(decoder, DrawSettings(temperature=0.0))
        results.append([given_logits(decoder), likely, draws(decoder, GUIDED, free)])
    Path(body["out"], f"result-{world.rank}.json").write_text(json.dumps(results))
    leave_world(world)


@pytest.mark.world
def test_a_sharded_prior_decodes_the_logits_of_one_process(tmp_path: Path) -> None:
    """3 heads are padded for 2 tensor ranks; one has little memory, and all split alike."""
    tensor = pipeline = 2
    configs = [replace(CONFIG, layers=n, conv_kernel=kernel) for n, kernel in MASKS] + [MODERN]
    folders = [tmp_path / f"prior-{i}" for i in range(len(configs))]
    priors = [write_prior(*pair) for pair in zip(folders, configs, strict=True)]
    mesh = {"tensor": tensor, "pipeline": pipeline}
    body = {"priors": [str(folder) for folder in folders], "out": str(tmp_path), **mesh}
    ranks = run_world(f"{__name__}:decode", body, tensor * pipeline)
    for i, (layers, folder) in enumerate(zip(priors, folders, strict=True)):
        with torch.no_grad():
            whole = prior_logits(layers, prior_batch())[:, 3:]
            whole = torch.cat([whole, whole[:, -1:]], 1)
        last = [rank[i][0] for rank in ranks if rank[i][0] is not None]
        assert len(last) == tensor
        for logits in last:
            assert float((torch.tensor(logits) - whole).abs().max()) < 1e-4
        one = Decoder(load_local_prior(folder, None, Mesh())[0])
        expected = [draws(one, DrawSettings(temperature=0.0)), draws(one, GUIDED)]
        assert all(rank[i][1:] == expected for rank in ranks)


def speculate(payload: str) -> None:
    """A rank: draws with guesses, with its part of a prior."""
    body = json.loads(payload)
    world = join_world()
    mesh = build_mesh(MeshConfig(tensor=world.size), world)
    part = load_local_prior(Path(body["prior"]), None, mesh)[0]
    results = draws(Decoder(part, together=5), GUIDED)
    Path(body["out"], f"result-{world.rank}.json").write_text(json.dumps(results))
    leave_world(world)


@pytest.mark.world
def test_tensor_ranks_check_the_same_guesses(tmp_path: Path) -> None:
    write_prior(tmp_path / "prior", MODERN)
    expected = draws(Decoder(load_local_prior(tmp_path / "prior", None, Mesh())[0]), GUIDED)
    body = {"prior": str(tmp_path / "prior"), "out": str(tmp_path)}
    assert run_world(f"{__name__}:speculate", body, 2) == [expected, expected]
