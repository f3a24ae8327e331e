"""Inputs of a run's stages, and which of them are missing."""

import json
from pathlib import Path
from typing import Any

from cluster.chain import Scheduler
from core.config import S3
from core.errors import StoreError
from core.log import LOG
from core.storage.mixture import data_sets
from core.storage.store import open_store
from data_pipeline.formats.manifest import NAME, SPLITS
from data_pipeline.text.bpe import FILE as TOKENIZER
from training.config import DVAETrain
from training.run.trackers.config import missing_libraries
from workflow.run_file import RunFile

_RAW, _TOKENS = "pairs", "tokens"
_DVAE, _PRIOR, _CLIP, _BPE = "a dVAE", "a prior", "a CLIP", "a BPE vocabulary"
_DRAWN = (_PRIOR, _DVAE, _CLIP, _BPE)
READ: dict[str, tuple[str, ...]] = {
    "bpe": (_RAW,),
    "dvae": (_RAW,),
    "tokenize": (_RAW, _DVAE, _BPE),
    "prior": (_TOKENS, _BPE),
    "clip": (_RAW, _BPE),
    "overlap": (_RAW, _CLIP),
    "score": _DRAWN,
    "evaluate": (_RAW, *_DRAWN),
}
"""Inputs of each stage; `pack`, `overlap` and `score` also have a source."""
MADE_BY = {
    _RAW: "pack",
    _TOKENS: "tokenize",
    _DVAE: "dvae",
    _PRIOR: "prior",
    _CLIP: "clip",
    _BPE: "bpe",
}
"""The stage that makes each input."""
_MODEL = "model.json"
_WEIGHTS, _HELD_BY = "weights", (_MODEL, "config.json", "manifest.json")
"""Weights to start from, and the files of a finished model, a run and a checkpoint."""
_FILE, _INCEPTION = "a file", "inception"
"""A file of weights, and the flag of `score` that names one."""
_VERB = {True: "needs", False: "need"}


def missing_inputs(run: RunFile, settings: dict[str, Any], to: Scheduler) -> list[str]:
    """Problems of inputs that no stage of the run makes and that do not exist, with fixes.

    `settings`: settings of each stage. For Kubernetes, folders are not checked, since this machine
    need not see its volumes.
    """
    by_input: dict[tuple[str, str], list[str]] = {}
    for stage in run.stages:
        for what in _reads(run, stage, settings[stage]):
            for place in _places(run, what, settings[stage]):
                if place != _own(run, what) or MADE_BY[what] not in run.stages:
                    by_input.setdefault((what, place), []).append(stage)
    return [
        f"stages: {' and '.join(readers)} {_VERB[len(readers) == 1]} {what} from {place}: there is "
        f"nothing, and no stage of the file makes it; add {MADE_BY[what]}, or give the out and "
        "store of the run that did"
        for (what, place), readers in by_input.items()
        if _is_absent(what, place, to)
    ] + [text for name in run.stages for text in _missing_files(run, name, settings[name], to)]


def _missing_files(run: RunFile, stage: str, settings: Any, to: Scheduler) -> list[str]:
    """Problems of places and files that a stage's flags name and that no stage makes."""
    where, problems = f"stages.{stage}.flags", list[str]()
    place = getattr(settings, "init", "")
    if place and _is_absent(_WEIGHTS, place, to):
        problems.append(
            f"{where}.init={place!r} holds no weights; give the out of a run, a finished model or "
            "a checkpoint"
        )
    elif place and to != "kubernetes" and (other := _stage_in(place)) not in ("", stage):
        problems.append(f"{where}.init={place!r} holds a {other}, not a {stage}")
    folder = getattr(settings, "init_bpe", None)
    own = folder is not None and str(folder) == _own(run, _BPE) and MADE_BY[_BPE] in run.stages
    if folder is not None and not own and _is_absent(_BPE, str(folder), to):
        problems.append(f"{where}.init_bpe={str(folder)!r} holds no {TOKENIZER}")
    files = settings.weights_files() if isinstance(settings, DVAETrain) else {}
    if given := run.stages[stage].flags.get(_INCEPTION):
        files[_INCEPTION] = Path(str(given))
    if to == "local" and not run.python:
        texts = missing_libraries(getattr(settings, "track", ""))
        problems += [f"stages.{stage}.flags.{text}" for text in texts]
    for name, path in files.items():
        if _is_absent(_FILE, str(path), to):
            problems.append(f"{where}.{name}={str(path)!r}: there is no such file of weights")
    return problems


def unfinished_inputs(run: RunFile, settings: dict[str, Any]) -> list[str]:
    """Notices of stages that loop.stop_at ends early, although later ones read their models."""
    notices = []
    for what, stage in MADE_BY.items():
        loop = getattr(settings.get(stage), "loop", None)
        readers = [name for name in run.stages if what in _reads(run, name, settings[name])]
        if loop is not None and loop.end < loop.steps and readers:
            *rest, last = readers
            names = f"{', '.join(rest)} and {last} read" if rest else f"{last} reads"
            notices.append(
                f"stages.{stage}.flags.loop.stop_at={loop.stop_at} is below loop.steps="
                f"{loop.steps}: {what} stays unfinished, and {names} its last "
                "checkpoint; leave loop.stop_at out to train it to the end first"
            )
    return notices


def _reads(run: RunFile, stage: str, settings: Any) -> tuple[str, ...]:
    read = READ.get(stage, ())
    if stage == "score" and not run.stages[stage].source:
        return (_RAW, *read)
    if stage == "bpe" and settings.texts is not None:
        return ()
    if stage == "prior" and settings.bpe_dropout == 0:
        return tuple(what for what in read if what != _BPE)
    return read


def _own(run: RunFile, what: str) -> str:
    """The place of an input within the run."""
    data = {_RAW: run.raw, _TOKENS: run.tokens}
    return data.get(what) or str(run.folder(MADE_BY[what]))


def _places(run: RunFile, what: str, settings: Any) -> list[str]:
    """The places from which a stage reads an input: flags of a training stage may change it, and
    name the sets of a mixture."""
    given = getattr(settings, "data" if what in (_RAW, _TOKENS) else "bpe", None)
    if not given or what not in (_RAW, _TOKENS, _BPE):
        return [_own(run, what)]
    return [str(given)] if what == _BPE else [each.place for each in data_sets(given)]


def _stage_in(place: str) -> str:
    """The stage of a run or finished model in a folder; empty if it does not tell."""
    for name in (_MODEL, "config.json"):
        try:
            return str(json.loads((Path(place) / name).read_bytes())["stage"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""


def _is_absent(what: str, place: str, to: Scheduler) -> bool:
    """True if a place can be checked and does not hold an input."""
    if to == "kubernetes" and not place.startswith(S3):
        return False
    files = [f"{split}/{NAME}" for split in SPLITS]
    if what not in (_RAW, _TOKENS):
        files = [TOKENIZER if what == _BPE else _MODEL]
    try:
        if what == _FILE:
            return not Path(place).is_file()
        store = open_store(place)
        if what == _WEIGHTS:
            return not any(map(store.exists, _HELD_BY)) and not store.names("step-")
        return not all(store.exists(name) for name in files)
    except (StoreError, OSError) as error:
        LOG.info("%s is not looked at: %s", place, error)
        return False
