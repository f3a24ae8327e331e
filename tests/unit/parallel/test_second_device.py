"""Every stage on a device other than the CPU: no tensor may be on the wrong device."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import models.prior
from checkpoint.config import CheckpointConfig
from checkpoint.reader import open_checkpoint
from checkpoint.writer import write_checkpoint
from core.config import to_json
from core.heartbeat import Heart
from core.storage.store import FolderStore
from models.attention.masks import full_mask
from parallel.compress import powersgd
from parallel.compress.advisor import measure_compute
from parallel.compress.orthogonal import orthonormal
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.control import Vote, accept_all
from parallel.device import CPU
from parallel.engines.deepspeed.hooks import ensure_adam_state
from parallel.engines.modules import Compressor, decide_update, mean_losses
from parallel.engines.protocol import EngineSettings, build_adamw
from parallel.ledger import recorded
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from parallel.scales import Scale, Scales
from parallel.world import World
from tests.harness import rows_of
from tests.second_device import SECOND, SecondTensor
from training.config import LoopConfig, StageConfig
from training.presets import PRESETS
from training.recovery import diverge, replay
from training.stages import make_task
from training.trainer import Run

pytestmark = pytest.mark.seconds


def _dense(q: Tensor, k: Tensor, v: Tensor, *shape: Any) -> Tensor:
    mask = full_mask(*shape).to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.fixture(autouse=True)
def no_kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention compiles only for real devices."""
    monkeypatch.setattr(models.prior, "flexible_attention", _dense)
    monkeypatch.setattr(replay, "own_mesh", lambda: Mesh(world=World(device=SECOND)))


@pytest.fixture
def homes(raw: Path, bpe: Path, tokens: Path) -> dict[str, dict[str, Any]]:
    """The inputs of each stage."""
    return {
        "prior": {"data": str(tokens), "bpe": bpe, "bpe_dropout": 0.1},
        "dvae": {"data": str(raw)},
        "clip": {"data": str(raw), "bpe": bpe},
    }


def _settings(stage: str, home: dict[str, Any], out: Path, **engine: Any) -> Any:
    tiny = PRESETS[stage]["tiny"]()
    engine = {"name": "reference", "precision": "fp32", **engine}
    if stage == "prior":  # a layer of each mask
        tiny = replace(tiny, model=replace(tiny.model, dim=64, heads=2, layers=3))
    return replace(
        tiny,
        **home,
        out=out,
        loop=LoopConfig(
            steps=3, global_batch_size=8, validate_every=2, log_every=1, validation_samples=16
        ),
        optim=replace(tiny.optim, ema=0.9, ema_every=1),
        mesh=replace(tiny.mesh, data=1),
        engine=EngineConfig(**engine),
        order=replace(tiny.order, lanes=8),
        checkpoint=CheckpointConfig(every=1),
        profile=replace(tiny.profile, peak_tflops=1.0),
    )


@contextmanager
def _opened(stage: str, settings: StageConfig, device: torch.device) -> Iterator[Run]:
    mesh = Mesh(world=World(device=device))
    with recorded(mesh) as ledger:
        run = Run(stage, make_task(stage, settings, mesh), settings, mesh, ledger, Heart(0))
        try:
            yield run
        finally:
            run.close()


def _trained(stage: str, settings: StageConfig, device: torch.device) -> list[float]:
    """All losses in the run's folder, after training to the end."""
    with _opened(stage, settings, device) as run:
        run.train()
        held = {p.device for layer in run.engine.layers().values() for p in layer.parameters()}
        assert held == {device}
    rows = rows_of(settings.out) + rows_of(settings.out, "validation")
    return [row[name] for row in rows for name in ("loss", "shuffled_caption_loss") if name in row]


STAGES = [("prior", "fp32"), ("prior", "fp16"), ("dvae", "fp32"), ("clip", "fp32")]


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_stage_trains_validates_saves_and_resumes(
    stage: str, precision: str, homes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    losses = {}
    for device in (CPU, SECOND):
        out = tmp_path / device.type
        settings = _settings(stage, homes[stage], out, precision=precision)
        losses[device] = _trained(stage, settings, device)
        for gone in (out / "checkpoints" / "step-3", out / "model.safetensors"):
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        assert _trained(stage, settings, device) == losses[device], "resumed from step 2"
    ours, cpus = (torch.tensor(losses[device]) for device in (SECOND, CPU))
    # the same kernels but for attention; fp16 casts other rounding errors to 16 bits
    torch.testing.assert_close(ours, cpus, rtol=2e-3 if precision == "fp16" else 1e-5, atol=1e-6)


def test_a_checkpoint_of_one_device_is_read_on_the_other(
    homes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    settings = _settings("prior", homes["prior"], tmp_path)
    _trained("prior", settings, CPU)
    shutil.rmtree(tmp_path / "checkpoints" / "step-3")
    (tmp_path / "model.safetensors").unlink()
    _trained("prior", settings, SECOND)
    assert rows_of(tmp_path)[-1]["step"] == 3


def test_a_step_is_replayed(homes: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """A capsule of the run's third step; its records are read one by one."""
    settings = _settings("prior", homes["prior"], tmp_path)
    with _opened("prior", settings, SECOND) as run:
        for result, _ in run.steps():
            if run.step == 2:
                run.save()
                run.checkpoints.saver.wait()
                cast(Any, run.engine)._judge = lambda norm, loss: "planted"
            if run.step == 3:
                assert result.skipped == "planted"
    assert json.loads((tmp_path / "capsules/step-3.json").read_bytes())["history"] == []
    replayed = replay.replay(tmp_path / "capsules" / "step-3.json")
    assert replayed.same_records and not replayed.skipped and len(replayed.worst) == 5
    assert replayed.loss == pytest.approx(replayed.loss_then, rel=1e-6)


def test_a_step_is_traced_for_diverge(
    homes: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings("prior", homes["prior"], tmp_path / "run")
    _trained("prior", settings, SECOND)
    monkeypatch.setattr(diverge, "join_world", lambda: World(device=SECOND))
    out = tmp_path / "trace"
    out.mkdir()
    longer = replace(settings, out=out / "run", loop=replace(settings.loop, steps=4))
    body = {
        "stage": "prior",
        "settings": to_json(longer),
        "checkpoint": str(settings.out / "checkpoints" / "step-3"),
        "out": str(out),
    }
    diverge.trace_rank(json.dumps(body))
    notes = load_file(out / "rank-0.safetensors")
    assert {"forward/block000", "backward/block000"} <= notes.keys()


def _compressor(device: torch.device) -> Compressor:
    place = Placement(shape=(6, 9), first=0, rows=6, split=False)
    settings = EngineSettings(
        optim=OptimConfig(), engine=EngineConfig(), compress=CompressConfig(rank=2), seed=0
    )
    shards = [MatrixShard(name="w", rows=6, columns=9)]
    return Compressor({"w": place}, shards, 2, settings, Group(), Group(), device)


def test_gradients_are_compressed_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flat gradient followed by padding; buffers are saved and loaded. Bases as on GPUs."""
    monkeypatch.setattr(powersgd, "orthonormal", partial(orthonormal, cholesky=True))
    results = {}
    for device in (CPU, SECOND):
        draws, compressor = torch.Generator().manual_seed(0), _compressor(device)
        for _ in range(2):
            gradient = torch.randn(6 * 9 + 4, generator=draws).to(device)
            reduced = compressor.reduce({"w": gradient, "bias": torch.ones(3, device=device)})
            assert {g.device for g in reduced.gradients.values()} == {device}
            assert {s.device for s in reduced.squares.values()} == {device}
        results[device] = [reduced.gradients["w"].cpu(), next(iter(compressor.slices())).data.cpu()]
        slices = list(compressor.slices())
        write_checkpoint(
            FolderStore(tmp_path / device.type), "step-1", slices, {}, 0, lambda text: [text]
        )
        other = _compressor(device)
        other.load(open_checkpoint(f"{tmp_path / device.type}/step-1"))
        assert torch.equal(next(iter(other.slices())).data.cpu(), results[device][1])
    assert all(torch.equal(a, b) for a, b in zip(results[CPU], results[SECOND], strict=True))


def test_a_broken_gradient_is_told_where_it_is() -> None:
    compressor = _compressor(SECOND)
    reduced = compressor.reduce({"w": torch.full((54,), torch.nan, device=SECOND)})
    assert not reduced.finite and reduced.norm_squared.device == SECOND


def test_advice_is_measured_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    reduce = PowerSGD.reduce

    def noted(self: PowerSGD, gradients: Any) -> Any:
        made.extend(g.device for g in gradients.values())
        return reduce(self, gradients)

    monkeypatch.setattr(PowerSGD, "reduce", noted)
    assert measure_compute([MatrixShard(name="w", rows=4, columns=4)], 2, SECOND) > 0
    assert set(made) == {SECOND}


def test_one_reduction_decides_on_the_device() -> None:
    mesh, scale = Mesh(world=World(device=SECOND)), Scale()
    scale.note(torch.tensor(math.inf, device=SECOND))
    vote = Vote(losses=[{"loss": torch.tensor(3.0, device=SECOND)}])
    squares = [torch.tensor(16.0, device=SECOND)]
    decision = decide_update(squares, mesh, Scales([], {}), vote, accept_all)
    assert decision.clipped_by == 4.0
    assert decision.loss == 3.0
    broken = decide_update(squares, mesh, Scales(["a"], {"a": scale}), vote, accept_all)
    assert math.isinf(broken.clipped_by)


@pytest.mark.parametrize("last", [False, True])
def test_all_stages_broadcast_losses_from_their_device(
    last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL carries the last stage's tensor: a stage that waits with another backend would hang."""
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **_: sent.append(tensor))
    monkeypatch.setattr(dist, "get_global_rank", lambda *_: 1)
    stages = Group(cast(Any, object()), int(last), 2)
    mesh = Mesh(world=World(device=SECOND), pipeline=stages)
    seen = [{"loss": torch.tensor(2.0, device=SECOND)}] if last else []
    assert mean_losses(seen, ("loss",), mesh) == {"loss": 2.0 if last else 0.0}
    assert [(tensor.device, tensor.dtype) for tensor in sent] == [(SECOND, torch.float32)]


def test_the_second_device_refuses_what_cuda_refuses() -> None:
    ours, cpus = torch.ones(3, device=SECOND), torch.ones(3)
    assert isinstance(ours, SecondTensor) and (ours + torch.tensor(1.0)).tolist() == [2.0] * 3
    weight = torch.nn.Parameter(torch.ones(3, device=SECOND))
    weight.grad = torch.ones(3, device=SECOND)
    adamw = torch.optim.AdamW([weight], fused=True)
    moments = {name: torch.zeros(3, device=SECOND) for name in ("exp_avg", "exp_avg_sq")}
    adamw.state[weight] = {**moments, "step": torch.tensor(0.0)}
    for refused in (
        lambda: ours + cpus,
        lambda: torch.stack([ours.sum(), cpus.sum()]),
        lambda: torch.where(cpus > 0, ours, ours),
        lambda: ours @ cpus,
        adamw.step,
    ):
        with pytest.raises(RuntimeError, match="same device"):
            refused()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_deepspeeds_optimiser_state_is_made_where_its_partition_is(moments: Any) -> None:
    """After a resume the fused kernel must find its step count beside the moments."""
    partition = torch.nn.Parameter(torch.zeros(5, device=SECOND))
    partition.grad = torch.ones(5, device=SECOND)
    adamw = build_adamw({"w": partition}, OptimConfig(moments=moments))
    zero = SimpleNamespace(optimizer=adamw, single_partition_of_fp32_groups=[partition])
    ensure_adam_state(zero)
    assert {x.device for n, x in adamw.state[partition].items() if n != "step"} == {SECOND}
    adamw.step()
    assert float(adamw.state[partition]["step"]) == 1
