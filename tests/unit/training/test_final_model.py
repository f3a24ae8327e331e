"""The finished model of several ranks: even files, one description, and what a crash leaves."""

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint.format import StateSlice
from checkpoint.writer import write_checkpoint
from core.config import to_json
from core.errors import CorruptError, StoreError
from core.files import atomic
from core.storage.store import FolderStore
from generation.config import SampleConfig, SampleRun
from generation.sample import sample
from models.config import PriorConfig
from models.prior import build_prior
from planning.config import settings_of
from planning.estimate.layers import named, rank_layers
from tests.unit.finished import write_models
from training.export import save
from training.export.files import (
    SHARDS,
    WEIGHTS,
    cut_evenly,
    shard_names,
    write_index,
    write_weights,
)
from training.export.huggingface import export_parts, find_parts, import_parts
from training.export.names import DESCRIPTION
from training.export.save import FinishedModel, Writers, save_model
from training.export.weights import (
    describe,
    load_dvae,
    model_is_whole,
    open_model,
    write_description,
)
from workflow.verify import verify_path

CONFIG = PriorConfig(
    dim=32, heads=2, layers=4, text_length=4, text_vocabulary=40, image_vocabulary=30, grid=4
)
STEP = 7
FACTS = {"dvae": "d", "tokenizer": "t"}


def weights(factor: float) -> dict[str, Tensor]:
    tensors = build_prior(CONFIG, 0).named_parameters()
    return {name: factor * p.detach() for name, p in tensors}


def checkpoint(run: Path, factor: float) -> tuple[FolderStore, str]:
    """A run with one checkpoint: weights 0, and their average `factor` times the initial ones."""
    config = {"stage": "prior", "loop": {"steps": STEP}, "model": to_json(CONFIG)}
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(config))
    slices = [
        StateSlice(name=name, kind=kind, shape=tuple(data.shape), start=0, data=data.reshape(-1))
        for name, weight in weights(factor).items()
        for kind, data in (("master", 0 * weight), ("ema", weight))
    ]
    store, facts = FolderStore(run / "checkpoints"), {"stage": "prior", "step": STEP}
    facts |= {"config": config, "task": FACTS}
    write_checkpoint(store, f"step-{STEP}", slices, facts, 0, lambda text: [text])
    return store, f"step-{STEP}"


def saved_by(ranks: int, run: Path, at: tuple[FolderStore, str], most: float = 0) -> list[str]:
    """Save with some ranks, each a thread; returns the error of each, or ""."""
    texts, barrier = [""] * ranks, threading.Barrier(ranks)

    def rank(number: int) -> str:
        def gather(text: str) -> list[str]:
            texts[number] = text
            barrier.wait()
            every = list(texts)
            barrier.wait()
            return every

        model = FinishedModel(stage="prior", config=to_json(CONFIG), facts={**FACTS, "step": STEP})
        try:
            save_model(run, model, at, most, Writers(rank=number, size=ranks, gather=gather))
        except StoreError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank, range(ranks)))


def equal(run: Path, factor: float) -> bool:
    """True if readers find the initial weights times a factor."""
    model = open_model(run, "prior")
    return all(model.read(name).equal(value) for name, value in weights(factor).items())


def test_files_are_even_and_hold_each_tensor_once() -> None:
    """Tensors of 8, 7, 6, 5, 4, 3 and 2 elements: 35 in all."""
    shapes = {f"t{n}": (n,) for n in range(2, 9)}
    assert cut_evenly(shapes, 3) == {
        "model-00001-of-00003.safetensors": ["t2", "t3", "t8"],
        "model-00002-of-00003.safetensors": ["t4", "t7"],
        "model-00003-of-00003.safetensors": ["t5", "t6"],
    }
    assert cut_evenly(shapes, 1) == {WEIGHTS: sorted(shapes)}
    assert len(cut_evenly(shapes, 100)) == 4  # 35 // 8: no file can be smaller than a tensor
    even = {f"t{i}": (4, 5) for i in range(5)}
    assert len(cut_evenly(even, 8)) == 5
    assert len(cut_evenly(even, 4)) == 3  # four files would be 2, 1, 1, 1: 1.6 times the mean
    assert cut_evenly({"scalar": ()}, 4) == {WEIGHTS: ["scalar"]}


@pytest.mark.world
def test_the_12b_model_is_written_by_hundreds_of_ranks() -> None:
    """The largest tensor has 260 MB: of 1,024 ranks 189 write that on average, at most 315 MB."""
    layers = rank_layers(settings_of("paper_12b", 0).model, 0, 1)
    shapes = {name: held.placement.shape for name, held in named(layers).items()}
    files = cut_evenly(shapes, 1024)
    sizes = [sum(4 * prod(shapes[name]) for name in names) for names in files.values()]
    assert len(sizes) == 189 and max(sizes) <= 1.5 * sum(sizes) / len(sizes)
    assert max(sizes) < 315e6 and sum(sizes) == 4 * 12_292_587_008


def test_several_ranks_write_what_one_writes(tmp_path: Path) -> None:
    run, one = tmp_path / "run", tmp_path / "one"
    at = checkpoint(run, 3.0)
    assert saved_by(3, run, at) == [""] * 3
    names = shard_names(3)
    assert sorted(path.name for path in run.glob("model*")) == [*names, DESCRIPTION, SHARDS]
    merged: dict[str, Tensor] = {}
    for name in names:
        part = load_file(run / name)
        assert not part.keys() & merged.keys()
        merged |= part
    assert merged.keys() == weights(1.0).keys()
    assert all(merged[name].equal(value) for name, value in weights(3.0).items())
    index = json.loads((run / SHARDS).read_bytes())
    assert all(name in load_file(run / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == 4 * sum(w.numel() for w in merged.values())
    sizes = [(run / name).stat().st_size for name in names]
    assert max(sizes) <= 1.5 * sum(sizes) / 3
    one.mkdir()
    assert saved_by(2, one, at, most=1e9) == [""] * 2
    assert not (one / SHARDS).exists() and (one / WEIGHTS).is_file()
    both = [open_model(folder, "prior") for folder in (run, one)]
    assert both[0].digest == both[1].digest == describe(one, "prior")["sha256"]
    assert both[0].facts == both[1].facts and both[0].shapes == both[1].shapes
    assert equal(run, 3.0) and equal(one, 3.0)


def test_each_rank_reads_its_own_tensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = checkpoint(tmp_path, 1.0)
    seen: dict[str, set[str]] = {}
    whole = save.averaged_weight

    def noted(reader: Any, name: str) -> Tensor:
        seen.setdefault(threading.current_thread().name, set()).add(name)
        return whole(reader, name)

    monkeypatch.setattr(save, "averaged_weight", noted)
    assert saved_by(3, tmp_path, at) == [""] * 3
    assert len(seen) == 3
    assert sum(len(names) for names in seen.values()) == len(weights(1.0))


def test_files_are_spread_over_the_ranks() -> None:
    """189 files over 1,024 ranks: at most two for the 8 ranks of a node."""
    files = [str(i) for i in range(189)]
    owners = [
        rank
        for rank in range(1024)
        for _ in save._share(files, Writers(rank=rank, size=1024, gather=lambda text: [text]))
    ]
    assert len(owners) == len(set(owners)) == 189
    nodes = [owner // 8 for owner in owners]
    assert max(nodes.count(node) for node in nodes) == 2


def test_damage_and_other_folders_are_refused(tmp_path: Path) -> None:
    saved_by(3, tmp_path, checkpoint(tmp_path, 1.0))
    assert model_is_whole(tmp_path, "prior")
    assert f"{tmp_path}/{DESCRIPTION}" in verify_path(str(tmp_path))
    path = tmp_path / shard_names(3)[1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"model-00002-of-00003\.safetensors is damaged"):
        describe(tmp_path, "prior")
    path.unlink()
    with pytest.raises(CorruptError, match=r"model-00002-of-00003\.safetensors is damaged or miss"):
        open_model(tmp_path, "prior")
    outside = write_weights(tmp_path / "a" / "x", {"w": (1,)}, lambda _: torch.ones(1), None)
    row = replace(outside, file="a/x")
    write_description(tmp_path, "prior", {}, {}, [row, row])
    with pytest.raises(CorruptError, match="a/x is damaged or missing"):
        describe(tmp_path, "prior")


def test_a_rank_that_cannot_write_is_named_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, written = checkpoint(tmp_path, 1.0), write_weights

    def full(path: Path, *arguments: Any) -> Any:
        if path.name == shard_names(3)[2]:
            raise OSError(28, "No space left on device", str(path))
        return written(path, *arguments)

    monkeypatch.setattr(save, "write_weights", full)
    for error in saved_by(3, tmp_path, at):
        assert error.startswith("the finished model was not written: rank 2: cannot read or write")
        assert "No space left on device; free space" in error
    assert not (tmp_path / DESCRIPTION).exists() and equal(tmp_path, 1.0)


def test_a_file_that_rank_0_does_not_see_is_written_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 1 writes to another node's disk."""
    run, node = tmp_path / "run", tmp_path / "node"
    at, written = checkpoint(run, 1.0), write_weights
    first = threading.Event()

    def apart(path: Path, *arguments: Any) -> Any:
        away = path.name == shard_names(2)[1] and not first.is_set()
        if away:
            first.set()
        return written(node / path.name if away else path, *arguments)

    monkeypatch.setattr(save, "write_weights", apart)
    assert saved_by(2, run, at) == ["", ""]
    assert (node / shard_names(2)[1]).read_bytes() == (run / shard_names(2)[1]).read_bytes()
    assert equal(run, 1.0) and model_is_whole(run, "prior")


@pytest.mark.parametrize("index", [None, "{}", "[]", "no JSON", '{"weight_map": {}}'])
def test_a_lost_or_damaged_index_is_made_again(tmp_path: Path, index: str | None) -> None:
    """Others read the files by the index, and a model without it is none for them."""
    at = checkpoint(tmp_path, 2)
    assert not any(saved_by(4, tmp_path, at)) and model_is_whole(tmp_path, "prior")
    whole, path = (tmp_path / SHARDS).read_bytes(), tmp_path / SHARDS
    path.unlink() if index is None else path.write_text(index)
    with pytest.raises(CorruptError, match=r"index\.json is damaged or missing"):
        describe(tmp_path, "prior")
    assert not model_is_whole(tmp_path, "prior")
    saved_by(4, tmp_path, at)
    assert path.read_bytes() == whole and model_is_whole(tmp_path, "prior")


@pytest.mark.world
def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    """SIGKILL before each change of the folder: the old description's model, or the checkpoint.

    The old one is in two files of 1.0, the new one in three of 2.0, or in one.
    """
    for ranks, changes in ((3, 9), (1, 6)):
        outcomes = []
        for boundary in range(changes + 1):
            run = tmp_path / f"{ranks}-{boundary}"
            saved_by(2, run, checkpoint(run, 1.0))
            at = checkpoint(run, 2.0)
            code = _killed(boundary, lambda: saved_by(ranks, run, at))  # noqa: B023
            assert (code == 0) == (boundary == changes), (ranks, boundary, code)
            outcomes.append("old" if equal(run, 1.0) else "new" if equal(run, 2.0) else "broken")
            assert saved_by(ranks, run, at) == [""] * ranks
            assert equal(run, 2.0) and model_is_whole(run, "prior")
            stored = len(list(run.glob("model*.safetensors")))
            assert stored == ranks
        assert outcomes == ["old"] + ["new"] * changes


def _killed(boundary: int, work: Callable[[], Any]) -> int:
    """Exit code of a process that kills itself before its change number `boundary`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left, lock = [boundary], threading.Lock()

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            with lock:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*arguments, **named)

        return call

    os.replace = counted(os.replace)
    unlink = Path.unlink

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        if path.exists() and not path.name.startswith(atomic.TEMPORARY):
            counted(unlink)(path)

    Path.unlink = unlinked  # type: ignore[method-assign]
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.world
def test_models_in_several_files_are_used_as_those_in_one(tmp_path: Path) -> None:
    """Sampled, exported, imported, and known by the same digests."""
    models = write_models(tmp_path / "one", ["a small red circle"])
    other = write_models(tmp_path / "two", ["a small red circle"])
    for stage in ("dvae", "prior", "clip"):
        _cut(tmp_path / "two" / stage, stage)
    pictures = []
    for folder in (models, other):
        out = folder.prior.parent / "best.png"
        draw = SampleConfig(candidates=3)
        sample(SampleRun(captions=("a small red circle",), out=out, models=folder, draw=draw))
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    assert load_dvae(other.dvae)[1] == load_dvae(models.dvae)[1]
    for name in ("one", "two"):
        export_parts(find_parts(tmp_path / name, {}), tmp_path / f"{name}.hub", 10**9)
        import_parts(tmp_path / f"{name}.hub", tmp_path / f"{name}.back")
    for stage in ("dvae", "prior", "clip"):
        hub, back = (f"two.{kind}/{stage}/{WEIGHTS}" for kind in ("hub", "back"))
        assert (tmp_path / hub).read_bytes() == (tmp_path / hub.replace("two", "one")).read_bytes()
        assert (tmp_path / back).read_bytes() == (tmp_path / "one" / stage / WEIGHTS).read_bytes()


def _cut(folder: Path, stage: str) -> None:
    """Turn a finished model in one file into one in several."""
    model = open_model(folder, stage)
    files = cut_evenly(model.shapes, 3)
    assert len(files) > 1
    rows = [
        write_weights(folder / file, {n: model.shapes[n] for n in names}, model.read, None)
        for file, names in files.items()
    ]
    write_index(folder, files, model.shapes)
    write_description(folder, stage, model.config, model.facts, rows)
    (folder / WEIGHTS).unlink()
