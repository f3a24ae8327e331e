"""Initial weights from another run: `--init PLACE`, read only by a run without a checkpoint.

The stored weights look like a checkpoint of this run at step 0, so that every engine on any mesh
loads its own part of them as it resumes. Moments begin at zero, and learning rates at step 1.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.format import KINDS
from checkpoint.together import by_all, together
from core.config import S3, to_json
from core.errors import CorruptError, InputError, TapirError, joined
from core.files.atomic import Json
from core.log import LOG
from data_pipeline.text.bpe import load_tokenizer
from models.adapters import is_adapter
from parallel.engines.protocol import Layer, Program
from parallel.placement import Placement, placement_of
from parallel.world import World
from training.initial.carry_over import Carried, Pieces, Vocabularies, carry, table
from training.initial.source import WeightsSource, open_source
from training.tasks.task import Task

INIT = "init"
"""The event of a run's history that names the weights it started from."""


class DrawnWeights:
    """The initial weights that a run draws, by ranges of global tensors.

    Made before the engine, which may empty or change modules that exist already.
    """

    def __init__(self, program: Program) -> None:
        self._layers = {layer.name: layer for layer in program.layers}
        self._made: dict[str, Tensor] = {}
        """Weights of layers that draw no parts: copies, flat."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Global shapes of all layers, also those of other ranks; without tied copies."""
        for layer in program.layers:
            self._add(layer)

    def _add(self, layer: Layer) -> None:
        with torch.device("meta"):  # modules that exist keep their device
            module = layer.build()
        for name, parameter in module.named_parameters():
            place = placement_of(parameter)
            if place.tied_to:  # its owner's weights are stored and loaded
                continue
            self.shapes[f"{layer.name}.{name}"] = place.shape
            if layer.draw is None:
                flat = parameter.detach().to("cpu", copy=True).reshape(-1)
                self._made[f"{layer.name}.{name}"] = flat

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat global tensor, float32."""
        if name in self._made:
            return self._made[name][start:stop]
        first, _, inside = name.partition(".")
        shape, draw = self.shapes[name], self._layers[first].draw
        assert draw is not None, "layers that draw no parts are copied"
        whole = Placement(shape=shape, first=0, rows=shape[0] if shape else 1, split=False)
        values = torch.empty(stop - start, device="cpu")
        draw(inside, whole, start, values)
        return values


class InitialReader:
    """Another run's weights as a checkpoint of this run at step 0: moments and step are zero."""

    def __init__(
        self, source: WeightsSource, carried: dict[str, Carried], drawn: DrawnWeights
    ) -> None:
        self._source, self._carried, self._drawn = source, carried, drawn
        self._resized = lru_cache(maxsize=1)(self._resize)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
        return dict(self._drawn.shapes)

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The global tensor's shape."""
        return () if kind == "step" else self._drawn.shapes[name]

    def kinds(self, name: str) -> list[str]:
        """Kinds of one parameter; none for gradient scales and error buffers, which begin anew."""
        return sorted(KINDS) if name in self._carried else []

    def tensor(self, name: str, kind: str) -> Tensor:
        """The whole global tensor, float32."""
        shape = self.shape(name, kind)
        return self.flat(name, kind, 0, prod(shape)).view(shape)

    def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat global tensor, float32."""
        if kind != "master":
            return torch.zeros(stop - start, device="cpu")
        how = self._carried[name].how
        if how == "taken":
            return self._source.flat(name, start, stop)
        if how == "resized":
            return self._resized(name)[start:stop]
        return self._drawn.flat(name, start, stop)

    def _resize(self, name: str) -> Tensor:
        change = self._carried[name].change
        assert change is not None, "resized tensors have a rule"
        return change(self._source.tensor(name)).reshape(-1)


def load_initial(
    drawn: DrawnWeights,
    stage: str,
    task: Task[Any],
    settings: Any,
    world: World,
    base: Callable[..., WeightsSource] | None = None,
) -> tuple[InitialReader, Json]:
    """Open the weights at settings.init for this run, or those that `base` finds; collective.

    Returns what the engine loads, and the event for the run's history.
    Raises: InputError if there are none, they are of another stage, or nothing of them fits;
    CorruptError if a byte changed.
    """
    if base is None:
        source = _open(partial(open_source, settings.init, stage), stage, world)
    else:
        source = _open(partial(base, stage, init=settings.init), stage, world)
    vocabularies = Vocabularies(
        pieces=by_all(world.gather_text, lambda: _pieces(task.facts(), settings, source)),
        same_codes=task.facts().get("dvae") == source.facts.get("dvae"),
    )
    carried = carry(drawn.shapes, source.shapes, vocabularies)
    names = {how: [n for n, each in carried.items() if each.how == how] for how in _HOW}
    names["left"] = sorted(set(source.shapes) - set(carried))
    if not any(len(carried[name].shape) > 1 for name in names["taken"]):
        raise InputError(
            f"init={settings.init!r} holds no matrix of this model's shapes "
            f"({source.config} there); give the same model.* flags, or leave --init out\n"
            + "\n".join(table(carried, source.shapes)[:_SHOWN])
        )
    differs = differences_beside_shapes(to_json(task.model_config), source.config)
    _tell(source, carried, names, differs)
    taken = len(names.pop("taken"))
    event = {"event": INIT, "step": 0, "from": source.url, "digest": source.digest}
    facts = {"steps_there": source.facts.get("step"), "taken": taken}
    if differs:
        facts["differs"] = differs
    return InitialReader(source, carried, drawn), {**event, **facts, **names}


_HOW = ("taken", "resized", "new")
_SHOWN = 20
"""Lines of the table in an error."""


def _open(find: Callable[[], WeightsSource], stage: str, world: World) -> WeightsSource:
    """Open the weights that rank 0 sees, and verify them by all ranks; raises alike on all."""

    def first() -> list[str]:
        source = find()
        return [source.url, source.digest]

    def opened() -> WeightsSource:
        source = open_source(url, stage)  # `find` may see another: a run that still trains saves
        if source.digest != digest:
            raise InputError(
                f"init: {url} holds other weights here (sha256 {source.digest}) than on rank 0 "
                f"(sha256 {digest}); give a place that all nodes share, or copy the same there"
            )
        if damaged := source.verify(world.rank, world.size):
            raise CorruptError(joined(damaged))
        return source

    gather = world.gather_text
    url, digest = together(gather, lambda: first() if world.rank == 0 else None)[0]
    return by_all(gather, opened)


def _pieces(facts: Json, settings: Any, source: WeightsSource) -> Pieces | None:
    """The stored tokens that spell each token; None for the same tokenizer, or none.

    Raises: InputError if a tokenizer cannot be found.
    """
    mine, theirs = facts.get("tokenizer"), source.facts.get("tokenizer")
    if mine == theirs:
        return None
    new = _tokenizer(str(mine), [settings.bpe], "that of the data", "--bpe")
    places = [Path(str(source.run["bpe"]))] if source.run.get("bpe") else []
    if not source.url.startswith(S3):
        places += [parent / "bpe" for parent in list(Path(source.url).parents)[:3]]
    given = [settings.init_bpe] if settings.init_bpe else places
    old = _tokenizer(str(theirs), given, f"that of {source.url}", "--init-bpe")
    ids = old.get_vocab()
    rows = []
    for token, _ in sorted(new.get_vocab().items(), key=lambda item: item[1]):
        known = ids.get(token)
        rows.append([piece.id for piece in old.model.tokenize(token)] if known is None else [known])
    return rows


def _tokenizer(digest: str, folders: list[Path], whose: str, flag: str) -> Any:
    for folder in folders:
        try:
            tokenizer, actual = load_tokenizer(folder)
        except TapirError:
            continue
        if actual == digest:
            return tokenizer
    places = ", ".join(map(str, folders)) or "no folder"
    raise InputError(
        f"init: the tokenizers differ, so rows of the vocabulary are carried over by token string, "
        f"and {whose} (sha256 {digest}) is not in {places}; give the folder of its tokenizer.json "
        f"as {flag}"
    )


def _tell(
    source: WeightsSource, carried: dict[str, Carried], names: dict[str, list[str]], differs: Json
) -> None:
    """Log what was taken, resized, drawn and left, and settings that change what weights mean."""
    counts = ", ".join(f"{len(each)} {how}" for how, each in names.items())
    bases = {name: each for name, each in carried.items() if not is_adapter(name)}
    lines = table(bases, source.shapes)
    LOG.info("init from %s (sha256 %s): %s", source.url, source.digest, counts)
    for line in lines:
        LOG.info("  %s", line)
    for name, (there, here) in differs.items():
        LOG.warning(
            "init: model.%s is %s here and %s there, which no shape shows: the weights compute "
            "something else; %s to go on from them",
            *(name, _flag_value(here), _flag_value(there), remedy(name, there)),
        )


def differences_beside_shapes(here: Json, there: Json) -> Json:
    """Settings of a model that no shape shows and that differ: name -> [there, here]."""
    names = [*_INVISIBLE]
    if here.get("quantizer") == there.get("quantizer") == "fsq":
        names.append("levels")
    if here.get("positions") == there.get("positions") == "rotary":
        names += _ROTATED_BY
        here, there = _with_columns(here), _with_columns(there)
    return {
        name: [there[name], here[name]]
        for name in names
        if name in here and there.get(name, here[name]) != here[name]
    }


def remedy(name: str, there: Any) -> str:
    """How a setting of the model becomes the one of the weights."""
    if name in _ROTATED_BY:
        return f"give tokens of a grid with {'rows' if name == 'grid' else name}={there}"
    return f"give --model.{name.replace('_', '-')} {_flag_value(there)}"


def _with_columns(config: Json) -> Json:
    """Sizes of a prior with the columns of a square grid, which 0 stands for."""
    return {**config, "columns": config.get("columns") or config.get("grid")}


def _flag_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


_INVISIBLE = ("heads", "conv_kernel", "gain", "quantizer", "epsilon")
"""Settings of the model that change what the same weights compute; `levels` is one of FSQ alone."""
_ROTATED_BY = ("grid", "columns")
"""Sizes of the prior that rotary positions follow from; of learned ones, shapes show them."""
