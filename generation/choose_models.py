"""Which models draw if none are named: the user's own, else shipped ones; imports no torch."""

from dataclasses import replace
from pathlib import Path

from core.errors import InputError
from core.log import LOG
from data_pipeline.text.bpe import FILE as TOKENIZER
from data_pipeline.text.words import load_words
from generation import shipped
from generation.config import ModelChoice, ModelPaths, SampleRun
from generation.shipped import paths_of, read_card, shipped_models, shipped_names
from training.export.names import CHECKPOINTS, DESCRIPTION

RUNS = Path("runs")


def with_models(run: SampleRun, captions: list[str]) -> SampleRun:
    """The run with all folders of its models, of which the log tells if it names none.

    Raises: InputError if there is neither an own nor a shipped set.
    """
    named = run.models.asked or run.follow
    models = run.models.paths if named else _chosen(run, captions)
    tell_unknown_words(models.bpe, captions)
    return replace(run, models=ModelChoice(**vars(models)))


def tell_unknown_words(bpe: Path, captions: list[str]) -> None:
    """Warn of words that no training caption of these models has."""
    words = load_words(bpe)
    if words is None:
        return
    unknown = list(dict.fromkeys(w for caption in captions for w in words.unknown(caption)))
    if unknown:
        LOG.warning("%s", words.explain(unknown))


def own_sets(root: Path = RUNS) -> list[Path]:
    """`root` and folders in it that hold a prior with its dVAE and tokenizer, the newest first."""
    folders = [root, *(each for each in root.iterdir() if each.is_dir())] if root.is_dir() else []
    known = [folder for folder in folders if _lacks(folder, ("prior", "dvae", "bpe")) == []]
    return sorted(known, key=lambda folder: (-_age(folder / "prior"), str(folder)))


def own_set(rerank: bool) -> Path | None:
    """The newest own set that can draw, and rank if asked for; None if there is none."""
    for folder in own_sets():
        if not rerank or not _lacks(folder, ("clip",)):
            return folder
        LOG.info("%s has no finished CLIP to rank with: passed over", folder)
    return None


def _chosen(run: SampleRun, captions: list[str]) -> ModelPaths:
    if run.weights:
        return _shipped(run.weights)
    if (own := own_set(run.rerank)) is not None:
        LOG.info("models: your own in %s (others: --prior RUN, or --weights NAME)", own)
        return paths_of(own)
    names = shipped_names()
    if not names:
        raise InputError(
            "there are no models in runs/, and this installation has no shipped ones: run "
            "`tapir demo`, or name a trained prior by --prior RUN"
        )
    return _shipped(max(names, key=lambda name: (_known(name, captions), name == "shapes")))


def _shipped(name: str) -> ModelPaths:
    models, card = shipped_models(name), read_card(name)
    LOG.info(
        "models: %s, shipped with Tapir: %s (%s); the figures of its card are of --temperature %g "
        "--guidance %g",
        *(name, card.title, models.prior.parent, card.score.temperature, card.score.guidance),
    )
    return models


def _known(name: str, captions: list[str]) -> int:
    """Number of the captions' words that a shipped set was trained on."""
    words = load_words(shipped.WEIGHTS / name / "bpe")
    return 0 if words is None else sum(map(words.known, captions))


def _lacks(folder: Path, models: tuple[str, ...]) -> list[str]:
    """Those of some models of which a folder has neither weights nor a checkpoint."""
    return [name for name in models if not _drawable(folder / name)]


def _drawable(run: Path) -> bool:
    finished = any((run / name).is_file() for name in (DESCRIPTION, TOKENIZER))
    return finished or next(run.glob(CHECKPOINTS), None) is not None


def _age(run: Path) -> float:
    """When a run's newest weights were written."""
    paths = [run / DESCRIPTION, *run.glob(CHECKPOINTS)]
    return max(path.stat().st_mtime for path in paths if path.exists())
