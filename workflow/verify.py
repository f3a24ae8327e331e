"""Check every digest of a data set, run folder, checkpoint or finished model."""

from pathlib import Path

from checkpoint.format import MANIFEST
from checkpoint.reader import finished_steps, open_checkpoint
from core.errors import InputError
from core.log import LOG
from core.storage.store import open_store
from data_pipeline.catalogue.parts import verify_catalogue
from data_pipeline.formats.manifest import NAME, SPLITS
from data_pipeline.formats.verify import verify_split
from training.export.names import DESCRIPTION
from training.export.weights import KINDS as MODELS
from training.export.weights import describe


def verify_path(path: str, sample: float = 1.0) -> list[str]:
    """Check everything at a path; returns a line for each thing checked.

    Raises: CorruptError naming the first damaged file.
    """
    store, verified = open_store(path), []
    for split in SPLITS:
        if store.exists(f"{split}/{NAME}"):
            count = verify_split(store, split, sample)
            what = "shards" if sample >= 1 else "blocks"
            verified.append(f"{path}/{split}: {count} {what}")
        elif any(name.endswith(".tar") for name in store.names(f"{split}/")):
            LOG.warning("%s/%s has shards and no %s: it is not checked", path, split, NAME)
    if sample >= 1 and (files := verify_catalogue(store)):
        verified.append(f"{path}/catalogue: {files} files")
    name = path.rstrip("/").rpartition("/")[2]
    if name.startswith("step-") and store.exists(MANIFEST):
        verified.append(open_checkpoint(path).url)
    for root in (path, f"{path.rstrip('/')}/checkpoints"):
        verified += _verify_checkpoints(root)
    folder = Path(path)
    if "://" in path:
        return verified
    if (folder / DESCRIPTION).exists():
        for stage in MODELS:
            try:
                describe(folder, stage)
                verified.append(f"{folder}/{DESCRIPTION}")
            except InputError:
                continue
    return verified


def _verify_checkpoints(root: str) -> list[str]:
    store = open_store(root)
    steps = finished_steps(store)
    started = {name.split("/")[0] for name in store.names("step-")}
    for name in sorted(started - {f"step-{step}" for step in steps}):
        LOG.warning("%s/%s has no manifest: it was never finished, and is not checked", root, name)
    return [open_checkpoint(f"{root}/step-{step}").url for step in steps]
