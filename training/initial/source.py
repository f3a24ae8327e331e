"""Weights that another run starts from: a finished model or a checkpoint, in a folder or bucket.

Tensors are read by ranges, so that a rank reads only its part of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from os.path import relpath
from pathlib import Path

from torch import Tensor

from checkpoint.format import MANIFEST
from checkpoint.reader import CheckpointReader, digest_of, finished_steps
from checkpoint.tensors import Read, Shapes, TensorFiles
from core.config import S3
from core.errors import AbsentError, CorruptError, InputError, StoreError
from core.files.atomic import Json, canonical_json, sha256, unseal
from core.storage.store import Store, open_store
from models.adapters import A, B, factors
from models.config import LoraConfig
from training.ema import EMA
from training.export.files import (
    CONFIG,
    WEIGHTS,
    facts_with_new_names,
    with_article,
)
from training.export.names import DESCRIPTION
from training.stages import STAGES, config_with_new_names

_STEP, _CHECKPOINTS, _EXPORT = "step-", "checkpoints", "model_index.json"


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """A model's weights by global name: EMA weights, if its checkpoint has them."""

    stage: str
    url: str
    """Its checkpoint, or the folder of the finished model."""
    config: Json
    """The network's sizes."""
    facts: Json
    """Facts about its training."""
    run: Json
    """Settings of its run; empty if unknown."""
    digest: str
    """sha256 of the weights' file, or of the list of the files with theirs."""
    shapes: Shapes
    flat: Callable[[str, int, int], Tensor]
    """(name, start, stop) -> these elements of the flat global tensor, float32."""
    verify: Callable[[int, int], list[str]]
    """(rank, ranks) -> problems of this rank's share of the files."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, float32."""
        shape = self.shapes[name]
        return self.flat(name, 0, prod(shape)).view(shape)


def open_source(place: str, stage: str) -> WeightsSource:
    """Open the weights at a place: a run folder, a finished model, or one checkpoint (step-N).

    A run folder without a finished model gives its newest checkpoint. `verify` is still to be
    called.
    Adapters are merged into their base.
    Raises: InputError if there is none, or it is of another stage; CorruptError if it is damaged.
    """
    place = place.rstrip("/")
    if not place.startswith(S3) and Path(place).is_file():
        raise InputError(f"init={place!r} is a file; give its folder, {Path(place).parent}")
    store = open_store(place)
    root, _, name = place.rpartition("/")
    if name.startswith(_STEP) and store.exists(MANIFEST):
        source = _checkpoint(open_store(root or "."), name, {})
    elif store.exists(DESCRIPTION):
        source = _finished(store)
    else:
        source = _newest(store, stage)
    if source.stage != stage:
        raise InputError(f"init={place!r} holds {with_article(source.stage)}, not a {stage}")
    if ADAPTERS not in source.facts:
        return source
    merged = merge(stage, source.facts, (source.shapes, source.tensor), source.url)
    base = merged.base

    def verify(rank: int, ranks: int) -> list[str]:
        return [*source.verify(rank, ranks), *base.verify(rank, ranks)]

    return replace(
        source,
        facts=merged.facts,
        digest=sha256(canonical_json({"adapters": source.digest, "base": base.digest})),
        shapes=base.shapes,
        flat=merged.flat,
        verify=verify,
    )


ADAPTERS, MERGED = "adapters", "merged_adapters"
"""Facts of a model that consists of adapters alone, and of one that they were merged into."""


def adapter_facts(lora: LoraConfig, base_url: str, digest: str, out: Path) -> Json:
    """What a run of adapters stores beside them: how they are merged, and into which model.

    The base is noted by its place, and by its path from the run's folder, so that both may be moved
    together.
    """
    base: Json = {"place": base_url, "digest": digest}
    if not base_url.startswith(S3):
        base["place"] = str(Path(base_url).absolute())
        base["beside"] = relpath(base["place"], out.absolute())
    return {"rank": lora.rank, "scale": lora.scale, "base": base}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Adapters merged into their base."""

    base: WeightsSource
    flat: Callable[[str, int, int], Tensor]
    """(name, start, stop) -> these elements of the flat global tensor, float32."""
    facts: Json
    """Those of the adapters; the base is only named by its digest."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, float32."""
        shape = self.base.shapes[name]
        return self.flat(name, 0, prod(shape)).view(shape)


def merge(stage: str, facts: Json, adapters: tuple[Shapes, Read], url: str) -> Merged:
    """Merge adapters, which are at `url`, into their base.

    Raises: InputError if the base is not where it was, or is another model now.
    """
    noted, (shapes, read) = facts[ADAPTERS], adapters
    base, scale = base_of(stage, noted["base"], url), float(noted["scale"])

    def flat(name: str, start: int, stop: int) -> Tensor:
        values, stem = base.flat(name, start, stop), name.removesuffix(".weight")
        if name != f"{stem}.weight" or stem + A not in shapes:
            return values
        rows, columns = base.shapes[name]
        left, right = factors(rows, read(stem + A), read(stem + B))
        first, last = start // columns, -(-stop // columns)
        change = (scale * left[first:last] @ right).reshape(-1)
        return values + change[start - first * columns : stop - first * columns]

    merged = {"rank": noted["rank"], "scale": scale, "base": noted["base"]["digest"]}
    others = {name: value for name, value in facts.items() if name != ADAPTERS}
    return Merged(base=base, flat=flat, facts={**others, MERGED: merged})


def base_of(
    stage: str, noted: Json, url: str, init: str = "", moved: bool = False
) -> WeightsSource:
    """The model that the adapters at `url` were trained on: at `init`, where it was, or as far from
    them as then; if it was `moved`, at `init` alone.

    Raises: InputError if it is at none of them, or another model is.
    """
    places = [init, noted["place"]] if init else [noted["place"]]
    if moved:
        places = [init]
    elif "beside" in noted and not url.startswith(S3):
        outs = [Path(url), *list(Path(url).parents)[1:2]]  # of OUT/checkpoints/step-N
        places += [str(out / noted["beside"]) for out in outs]
    others = []
    for place in places:
        try:
            source = open_source(place, stage)
        except (InputError, StoreError):
            continue
        if source.digest == noted["digest"]:
            return source
        others.append(place)
    changed = f"; {', '.join(others)} holds another one now" if others else ""
    remedy = ", or give its place by --resume-with init=PLACE" if init else ""
    raise InputError(
        f"{url} holds adapters of the {stage} that was at {noted['place']} (sha256 "
        f"{noted['digest']}), which is not there{changed}; put it back, there or in the same place "
        f"relative to the adapters' run{remedy}"
    )


def _newest(store: Store, stage: str) -> WeightsSource:
    """The newest checkpoint of a run folder, or of a folder of checkpoints."""
    run = _run_settings(store)
    kept = str(run.get("checkpoint", {}).get("to") or "")
    for each in (open_store(kept or f"{store.url}/{_CHECKPOINTS}"), store):
        if steps := finished_steps(each):
            return _checkpoint(each, f"{_STEP}{steps[-1]}", run)
    if store.exists(_EXPORT):
        raise InputError(
            f"init={store.url!r} was written by `tapir export`; `tapir import {store.url} OUT` "
            f"makes run folders of it, then give OUT/{stage}"
        )
    raise InputError(
        f"init={store.url!r} holds neither a finished model ({DESCRIPTION}) nor a checkpoint; give "
        f"the --out of `tapir train {stage}`, or one checkpoint, e.g. RUN/{_CHECKPOINTS}/step-1000"
    )


def _run_settings(store: Store) -> Json:
    """Settings of the run in a folder; empty if there are none, or they are not readable."""
    try:
        body = json.loads(store.get(CONFIG))
        return (
            config_with_new_names(body, f"{store.url}/{CONFIG}") if isinstance(body, dict) else {}
        )
    except (AbsentError, ValueError):
        return {}


def _checkpoint(store: Store, name: str, run: Json) -> WeightsSource:
    reader = CheckpointReader(store, name)
    facts = reader.facts
    if facts["stage"] not in STAGES:
        raise InputError(f"{reader.url} is of stage {facts['stage']!r}, not of {', '.join(STAGES)}")
    config = config_with_new_names(facts["config"], reader.url)
    rows = [[file["file"], file["sha256"]] for file in reader.files]

    def flat(name: str, start: int, stop: int) -> Tensor:
        return reader.flat(name, EMA if EMA in reader.kinds(name) else "master", start, stop)

    def verify(rank: int, ranks: int) -> list[str]:
        try:
            reader.verify(rank, ranks)
        except CorruptError as error:
            return [str(error)]
        return []

    return WeightsSource(
        stage=facts["stage"],
        url=reader.url,
        config=config["model"],
        facts={**facts_with_new_names(facts.get("task", {})), "step": facts["step"]},
        run=run or config,
        digest=sha256(canonical_json({"files": rows})),
        shapes=reader.shapes(),
        flat=flat,
        verify=verify,
    )


def _finished(store: Store) -> WeightsSource:
    path = f"{store.url}/{DESCRIPTION}"
    body = unseal(store.get(DESCRIPTION), path)
    rows = [[row["file"], row["sha256"]] for row in body.get("files", [])]
    rows = rows or [[WEIGHTS, body["sha256"]]]
    if wrong := [name for name, _ in rows if "/" in name]:
        raise CorruptError(f"{path} names {wrong[0]!r}, outside of its folder")
    files = TensorFiles(store, [name for name, _ in rows])

    def verify(rank: int, ranks: int) -> list[str]:
        damaged = [name for name, sha in rows[rank::ranks] if _sha256(store, name) != sha]
        return [f"{store.url}/{name} is damaged or missing; copy it again" for name in damaged]

    return WeightsSource(
        stage=body["stage"],
        url=store.url,
        config=body["config"],
        facts=facts_with_new_names(body["facts"]),
        run=_run_settings(store),
        digest=body.get("sha256") or sha256(canonical_json({"files": rows})),
        shapes=files.shapes,
        flat=files.flat,
        verify=verify,
    )


def _sha256(store: Store, name: str) -> str:
    try:
        return digest_of(store, name)[1]
    except AbsentError:
        return ""
