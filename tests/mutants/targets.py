"""Which code is mutated, and which parts are excluded."""

import ast
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "core", "cluster", "checkpoint", "parallel", "models", "data_pipeline", "training",
    "planning", "generation", "serving", "workflow", "cli", "bench", "tapir",
)  # fmt: skip
"""What a child imports anew, so that a mutant is seen by all who import it."""

_FILES = (
    "models/*.py",
    "models/attention/*.py",
    "models/critics/*.py",
    "models/tokenizers/config.py",
    "models/tokenizers/protocol.py",
    "models/tokenizers/renames.py",
    "models/tokenizers/vq.py",
    "parallel/compress/*.py",
    "parallel/adamw.py",
    "parallel/replicas.py",
    "parallel/scales.py",
    "parallel/engines/protocol.py",
    "parallel/engines/modules.py",
    "parallel/engines/error_buffers.py",
    "data_pipeline/streaming/ahead.py",
    "data_pipeline/streaming/order.py",
    "data_pipeline/images/crops.py",
    "data_pipeline/text/dropout.py",
    "training/schedules.py",
    "training/run/feed.py",
    "training/trainer.py",
    "training/ema.py",
    "training/initial/carry_over.py",
    "training/initial/source.py",
    "training/tasks/*.py",
    "training/export/custom_code/*.py",
    "generation/sampling/draw.py",
    "generation/sampling/sampler.py",
    "generation/sampling/decoder.py",
    "generation/sampling/decoder_block.py",
    "generation/sampling/running.py",
    "generation/sampling/running_lane.py",
    "generation/evaluation/accuracy.py",
    "generation/evaluation/suites/best_of_n.py",
    "generation/evaluation/suites/clipscore.py",
    "generation/evaluation/suites/criteria.py",
    "generation/evaluation/suites/fid.py",
    "generation/evaluation/suites/geneval.py",
    "generation/evaluation/suites/panels.py",
    "generation/evaluation/suites/shapes.py",
)
_ONLY = {
    "generation/evaluation/suites/clipscore.py": {
        "measure", "_scores", "_score", "label_of", "clip_scores", "_figures"
    },
    "generation/evaluation/suites/shapes.py": {
        "measure", "_row", "_reconstructed", "objects_by_draw", "_share", "_headline"
    },
    "parallel/replicas.py": {"flat_average", "copy_parts"},
    "training/initial/source.py": {"merge"},
    "training/trainer.py": {"steps", "one_step", "_loss_now"},
}  # fmt: skip
"""Of these files only some functions: the rest is about folders, files, logs and processes."""
_NOT = ("__init__.py", "splits.py", "third_party.py")
"""splits.py hands a data set's manifests from rank to rank; third_party.py imports."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file, and the functions of it that are mutated (all if empty)."""

    path: str
    functions: frozenset[str] = frozenset()


def targets() -> list[Target]:
    """All files that `make mutants` changes."""
    paths = sorted({path for pattern in _FILES for path in ROOT.glob(pattern)})
    names = [path.relative_to(ROOT).as_posix() for path in paths if path.name not in _NOT]
    return [Target(path=name, functions=frozenset(_ONLY.get(name, ()))) for name in names]


def is_message(node: ast.AST) -> bool:
    """True for a node that only formats a message or narrows a type."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Name):
        return called.id == "TypeVar"
    return isinstance(called, ast.Attribute) and (
        isinstance(called.value, ast.Name) and called.value.id == "LOG"
    )


@lru_cache(maxsize=1024)
def file_digest(path: str) -> str:
    """Digest of a file, named from the root."""
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16]


def digest_of(tops: Iterable[str]) -> str:
    """Digest of all Python files below some folders, without tests/mutants."""
    digest = hashlib.sha256()
    for top in tops:
        for path in sorted((ROOT / top).rglob("*.py")):
            if "mutants" not in path.parent.name:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
