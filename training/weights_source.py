"""Weights that another run starts from: a finished model or a checkpoint, in a folder or bucket.

Tensors are read by ranges, so that a rank reads only its part of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from checkpoint.format import MANIFEST
from checkpoint.reader import CheckpointReader, digest_of, finished_steps
from checkpoint.tensors import Shapes, TensorFiles
from core.errors import AbsentError, CorruptError, InputError
from core.files.atomic import Json, canonical_json, sha256, unseal
from core.storage.store import Store, open_store
from training.ema import EMA
from training.export.files import WEIGHTS
from training.export.weights import CONFIG, DESCRIPTION, facts_with_new_names
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
    Raises: InputError if there is none, or it is of another stage; CorruptError if it is damaged.
    """
    place = place.rstrip("/")
    store = open_store(place)
    root, _, name = place.rpartition("/")
    if name.startswith(_STEP) and store.exists(MANIFEST):
        source = _checkpoint(open_store(root or "."), name, {})
    elif store.exists(DESCRIPTION):
        source = _finished(store)
    else:
        source = _newest(store, stage)
    if source.stage != stage:
        raise InputError(f"init={place!r} holds a {source.stage}, not a {stage}")
    return source


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
