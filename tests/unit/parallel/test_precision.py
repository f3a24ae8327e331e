"""The precision of fp32 matmuls, determinism, and the numerics recorded in results."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint.reader import open_checkpoint
from core.config import to_json
from core.errors import InputError
from core.files.atomic import canonical_json, seal
from core.log import LOG
from core.storage.store import FolderStore
from data_pipeline.formats.manifest import TOKENS, read_manifest
from data_pipeline.jobs.status import describe_status, job_status
from parallel.config import CompressConfig, EngineConfig
from parallel.device import CPU
from parallel.precision import (
    WORKSPACE,
    medium_is_accurate,
    set_flags,
    set_numerics,
    small_matmuls,
)
from parallel.world import World
from tests.chain import Chain
from tests.harness import ROOT
from tests.second_device import SECOND
from training import trainer as loop
from training.export.weights import open_model
from training.profiling.figures import measure_peak

META = torch.device("meta")
PACKAGES = (
    *("core", "parallel", "models", "data_pipeline", "training", "planning", "generation"),
    *("serving", "workflow", "cli"),
)
FLAGS = re.compile(
    r"allow_tf32|fp32_precision|set_float32_matmul|use_deterministic_algorithms|cudnn\.\w+ ="
    r"|reduced_precision_reduction|CUBLAS_WORKSPACE"
)


@pytest.fixture(autouse=True)
def _flags_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision()
    yield
    set_flags("cpu", before, True)


@pytest.mark.parametrize(("matmul", "tf32"), [("highest", False), ("medium", True)])
def test_torchs_older_and_newer_getters_agree(matmul: str, tf32: bool) -> None:
    """Inductor calls both; after a newer setter the older getters raise."""
    set_flags("cuda", matmul, deterministic=False)
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9
        newer = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        assert {part.fp32_precision == "tf32" for part in newer} == {tf32}


def test_gpus_compute_without_tf32_and_races_unless_asked_to() -> None:
    set_flags("cuda", "highest", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == WORKSPACE
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    set_flags("cuda", "highest", deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_nothing_else_sets_these_flags() -> None:
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    setters = {str(path.relative_to(ROOT)) for path in files if FLAGS.search(path.read_text())}
    assert setters == {"parallel/precision.py"}


class _Devices(TorchDispatchMode):
    """Records the devices on which operations compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor)]
        self.calls.append((func.overloadpacket.__name__, tensors))
        return out


def test_unresolved_auto_is_highest_and_asks_no_device() -> None:
    with _Devices() as seen:
        assert set_numerics(META, "auto").matmul == set_numerics(CPU, "auto").matmul == "highest"
    assert not seen.calls


def test_probing_other_kernels_restores_the_flags() -> None:
    for matmul in ("highest", "medium"):
        set_flags("cpu", matmul, True)
        with _Devices() as seen:
            medium_is_accurate()
        assert {x.device for _, tensors in seen.calls for x in tensors} == {CPU}
        with small_matmuls():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == matmul


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_measured_on_random_data(precision: str) -> None:
    with _Devices() as seen:
        assert measure_peak(precision, CPU) > 0
    operands = [x for name, tensors in seen.calls if name == "mm" for x in tensors[:2]]
    assert len(operands) >= 4
    assert all(abs(float(x.float().std()) - 1) < 0.01 for x in operands)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A dVAE, its tokens and a prior."""
    models = Chain(folder=tmp_path_factory.mktemp("chain"), device=CPU)
    models.pack()
    models.train("dvae")
    models.tokenize()
    models.train("prior", engine=EngineConfig(matmul_precision="highest"))
    return models


def test_checkpoints_models_and_tokens_tell_how_they_were_computed(chain: Chain) -> None:
    here = to_json(set_numerics(CPU))
    assert here["conv"] == "highest" and here["deterministic"] and "torch 2" in here["software"]
    assert open_checkpoint(f"{chain.folder}/prior/checkpoints/step-2").facts["numerics"] == here
    assert open_model(chain.folder / "prior", "prior").facts["numerics"] == here
    assert open_model(chain.folder / "prior", "prior", 2).facts["numerics"] == here
    tokens = FolderStore(chain.folder / "tokens")
    for split, shards in (("train", 4), ("validation", 4)):
        manifest = read_manifest(tokens, f"{split}/", TOKENS)
        assert manifest.numerics == [{**here, "shards": shards}]
    assert f"{shards} by {here['device']}" in describe_status(job_status(tokens))


def test_a_resumed_run_logs_changed_numerics(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    copy = replace(chain, folder=tmp_path / "copy")
    shutil.copytree(chain.folder, copy.folder)
    for matmul, told in (("highest", False), ("medium", True)):
        copy.forget("prior", 2)
        caplog.clear()
        with caplog.at_level(logging.WARNING, LOG.name):
            copy.train("prior", engine=EngineConfig(matmul_precision=matmul))  # type: ignore[arg-type]
        assert ("matmul highest, now medium" in caplog.text) == told
        assert ("not bit for bit" in caplog.text) == told


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_logs_changed_numerics(
    rank: int, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks resume; only one logs it."""
    told: list[object] = []
    monkeypatch.setattr(loop, "tell_differences", lambda *given: told.append(given))
    reader = open_checkpoint(f"{chain.folder}/prior/checkpoints/step-2")
    run = SimpleNamespace(
        checkpoints=SimpleNamespace(newest=lambda: reader),
        config=reader.facts["config"],
        numerics=set_numerics(CPU),
        resume_from=lambda _: None,
        folder=SimpleNamespace(note_history=lambda _: None),
        settings=SimpleNamespace(compress=CompressConfig(), loop=SimpleNamespace(end=2)),
        world=World(rank=rank, size=2),
        step=2,
    )
    loop.Run._resume(run)  # type: ignore[arg-type]
    assert len(told) == (rank == 0)


def test_what_older_versions_wrote_tells_nothing_and_is_read(chain: Chain, tmp_path: Path) -> None:
    numerics = set_numerics(CPU)
    assert numerics.differences({}) == []
    assert numerics.differences({"device": "H100", "unheard of": 1}) == [
        f"device H100, now {numerics.device}"
    ]
    shutil.copytree(chain.folder, tmp_path / "old")
    old = replace(chain, folder=tmp_path / "old")
    tokens = FolderStore(old.folder / "tokens")
    before = read_manifest(tokens, "train/", TOKENS)
    for name in tokens.names("train/_done/"):
        record = json.loads(tokens.get(name))
        del record["numerics"]
        tokens.put(name, canonical_json(record))
    body = json.loads(tokens.get("train/manifest.json"))
    kept = {key: value for key, value in body.items() if key not in ("numerics", "digest")}
    tokens.put("train/manifest.json", seal(kept))
    assert read_manifest(tokens, "train/", TOKENS) == replace(before, numerics=[])
    assert old.tokenize() == 0
    assert read_manifest(tokens, "train/", TOKENS).fingerprint == before.fingerprint


@pytest.mark.seconds
def test_fp32_codes_of_all_devices_may_mix_and_16_bits_may_not(chain: Chain) -> None:
    elsewhere = replace(chain, device=META)
    assert elsewhere.tokenize() == 0
    assert chain.tokenize("bf16", "half") == 8
    assert chain.tokenize("bf16", "half") == 0
    with pytest.raises(InputError, match="in 16 bits: device"):
        elsewhere.tokenize("bf16", "half")


@pytest.mark.seconds
def test_tokens_are_made_where_the_worker_is(chain: Chain) -> None:
    """The second device has the CPU's kernels, so its shards are the CPU's byte for byte."""
    assert replace(chain, device=SECOND).tokenize(place="second") == 8
    ours, cpus = (
        read_manifest(FolderStore(chain.folder / place), "train/", TOKENS)
        for place in ("second", "tokens")
    )
    assert ours.fingerprint == cpus.fingerprint
    assert [row["device"] for row in ours.numerics] == ["second"]


def test_cpus_convolve_in_fp32_and_repeat_every_bit() -> None:
    numerics = set_numerics(CPU, "medium", deterministic=False)
    assert (numerics.matmul, numerics.conv) == ("medium", "highest") and numerics.deterministic
