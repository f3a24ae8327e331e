"""One contender of the loader benchmark: reads every record once and prints its CPU time.

Runs in the contender's own virtual environment; only `tapir` imports the project.
Usage: python -P -m bench.support.loader_child CONTENDER PLACE
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import resource
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LANES = 512, 4
SHUFFLED = 5000
WORDS = 1280
"""Numbers of 16 bits in a record."""
MODULES = {
    "tapir": ("data_pipeline.streaming.stream", "data_pipeline.formats.tokens"),
    "webdataset": ("webdataset",),
    "litdata": ("litdata",),
    "mosaic": ("torch.distributed", "streaming"),
}
"""Imported before the clock starts."""


def raw(place: str) -> Iterator[int]:
    """Read the shards' bytes and nothing else."""
    for path in sorted(Path(place, "train").glob("*.tar")):
        data = np.frombuffer(path.read_bytes(), np.uint8)
        yield len(data) // (2 * WORDS)


def tapir(place: str) -> Iterator[int]:
    """Lane order, crc of every block, shuffled windows; batches as arrays."""
    from core.storage.store import open_store  # noqa: PLC0415
    from data_pipeline.config import OrderConfig  # noqa: PLC0415
    from data_pipeline.formats.tokens import TokenSource  # noqa: PLC0415
    from data_pipeline.streaming.stream import Stream  # noqa: PLC0415

    source = TokenSource(open_store(place), "train")
    stream = Stream(source, seed=1, batch=BATCH, order=OrderConfig(lanes=LANES))
    steps = stream.order.steps(0)
    for records, state in stream:
        assert records.image.shape == (BATCH, 1024) and len(records.text) >= BATCH * 256
        yield len(records)
        if state.step == steps:
            return


def webdataset_one(place: str) -> Iterator[int]:
    """One member a sample, shuffled."""
    for sample in _webdataset(place, SHUFFLED):
        assert len(np.frombuffer(sample["bin"], np.uint16)) == WORDS
        yield 1


def webdataset_plain(place: str) -> Iterator[int]:
    """One member a sample, not shuffled."""
    for sample in _webdataset(place, 0):
        assert len(np.frombuffer(sample["bin"], np.uint16)) == WORDS
        yield 1


def webdataset_two(place: str) -> Iterator[int]:
    """Two members a sample, shuffled."""
    for sample in _webdataset(place, SHUFFLED):
        image, text = (np.frombuffer(sample[name], np.uint16) for name in ("image", "text"))
        assert len(image) + len(text) == WORDS
        yield 1


def _webdataset(place: str, shuffled: int) -> Any:
    import webdataset  # noqa: PLC0415

    urls = json.loads(Path(place, "urls.json").read_text())
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls) if shuffled else False)
    return dataset.shuffle(shuffled) if shuffled else dataset


def litdata(place: str) -> Iterator[int]:
    """Chunks of numpy records, shuffled."""
    from litdata import StreamingDataset  # noqa: PLC0415

    for record in StreamingDataset(place, shuffle=True):
        assert len(record["image"]) + len(record["text"]) == WORDS
        yield 1


def mosaic(place: str) -> Iterator[int]:
    """MDS shards, shuffled."""
    from streaming import StreamingDataset  # noqa: PLC0415

    for record in StreamingDataset(local=place, shuffle=True, batch_size=BATCH):
        image, text = (np.frombuffer(record[name], np.uint16) for name in ("image", "text"))
        assert len(image) + len(text) == WORDS
        yield 1


def write_mosaic(place: str) -> None:
    """Write the records of PLACE/records.npy as MDS shards."""
    importlib.import_module("torch.distributed")
    from streaming import MDSWriter  # noqa: PLC0415

    records = np.load(Path(place, "records.npy"), mmap_mode="r")
    columns, out = {"image": "bytes", "text": "bytes"}, str(Path(place, "mosaic"))
    with MDSWriter(out=out, columns=columns, size_limit=2**26) as writer:
        for record in records:
            writer.write({"image": record[:1024].tobytes(), "text": record[1024:].tobytes()})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty packages for what mosaicml-streaming imports and reading token records never uses."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in ("torchvision", "transformers"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = _Stub(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        """Does nothing."""


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def write_litdata(place: str) -> None:
    """Write the records of PLACE/records.npy as litdata does."""
    from litdata.streaming.writer import BinaryWriter  # noqa: PLC0415

    records = np.load(Path(place, "records.npy"), mmap_mode="r")
    writer = BinaryWriter(str(Path(place, "litdata")), chunk_bytes="64MB")
    for i, record in enumerate(records):
        writer[i] = {"image": record[:1024].copy(), "text": record[1024:].copy()}
    writer.done()
    writer.merge(1)


def write_webdataset(place: str) -> None:
    """Write the records of PLACE/records.npy as tars of one, and of two members a sample."""
    import webdataset  # noqa: PLC0415

    records = np.load(Path(place, "records.npy"), mmap_mode="r")
    each = -(-len(records) // 10)
    for kind in ("one", "two"):
        folder = Path(place, f"webdataset-{kind}")
        folder.mkdir(exist_ok=True)
        for shard in range(10):
            with webdataset.TarWriter(str(folder / f"{shard:04d}.tar"), encoder=False) as tar:
                for i in range(shard * each, min(len(records), (shard + 1) * each)):
                    image, text = records[i, :1024].tobytes(), records[i, 1024:].tobytes()
                    parts = (
                        {"bin": image + text} if kind == "one" else {"image": image, "text": text}
                    )
                    tar.write({"__key__": f"{i:09d}", **parts})
        urls = sorted(str(path) for path in folder.glob("*.tar"))
        (folder / "urls.json").write_text(json.dumps(urls))


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its reaped children."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, kinds))


def main() -> None:
    """Run one contender, or one writer."""
    name, place = sys.argv[1:]
    if name.endswith("mosaic"):
        importlib.import_module("torch.distributed")
        sys.meta_path.append(_Stubs())
    if name.startswith("write"):
        globals()[name](place)
        return
    contender = globals()[name]
    for module in MODULES.get(name.partition("_")[0], ()):
        importlib.import_module(module)
    began, wall = cpu_seconds(), time.perf_counter()
    count = sum(contender(place))
    used, wall = cpu_seconds() - began, time.perf_counter() - wall
    print(json.dumps({"records": count, "cpu": 1e6 * used / count, "wall": 1e6 * wall / count}))


if __name__ == "__main__":
    main()
