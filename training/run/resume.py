"""Checks of a resumed run against its checkpoint."""

from typing import Any

from checkpoint.format import MEAN_ERROR
from checkpoint.reader import CheckpointReader
from core.errors import ConfigError
from core.log import LOG
from parallel.engines.protocol import Engine
from parallel.precision import Numerics
from training.stages import config_with_new_names

_MAY_CHANGE = (
    "out",
    "data",
    "grow",
    "mesh",
    "engine",
    "compress",
    "bpe",
    "checkpoint",
    "guard",
    "loader",
    "profile",
    "supervisor",
)
"""Settings that a resumed run may change."""
_LOOP_MAY_CHANGE = ("stop_at", "log_every", "validate_every", "validation_samples")


def refuse_other_config(reader: CheckpointReader, config: dict[str, Any]) -> None:
    """Raise ConfigError with a table of the settings that changed and must not."""
    stored = config_with_new_names(reader.facts["config"], reader.url)
    before, now = _fixed(stored), _fixed(config)
    rows = [
        (name, str(before.get(name)), str(now.get(name)))
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if rows:
        rows.insert(0, ("setting", "in the checkpoint", "now"))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        raise ConfigError(
            f"{reader.url} was written with other settings; give the same ones, or another "
            "--out:\n" + "\n".join(table)
        )


def refuse_other_shapes(reader: CheckpointReader, engine: Engine) -> None:
    """Raise ConfigError if the checkpoint lacks a tensor of the engine in its shape."""
    stored, mine = reader.shapes(), engine.shapes()
    wrong = sorted(set(mine.items()) - set(stored.items()))[:3]
    if wrong:
        raise ConfigError(f"{reader.url} holds other tensors than this model: {wrong} ...")


def tell_other_numerics(reader: CheckpointReader, numerics: Numerics) -> None:
    """Warn about changed numerics: the resumed run is then not bitwise reproducible."""
    recorded = reader.facts.get("numerics", {})
    if recorded:  # older versions noted the precision in the settings alone
        before = reader.facts["config"].get("engine", {}).get("precision", "fp32")
        recorded = {"precision": before, **recorded}
    changes = numerics.differences(recorded)
    if changes:
        LOG.warning(
            "%s was computed otherwise (%s): from here on losses equal those of an unbroken run up "
            "to rounding, not bit for bit",
            *(reader.url, "; ".join(changes)),
        )


def tell_dropped_errors(reader: CheckpointReader, compresses: bool) -> None:
    """Warn if the checkpoint holds error buffers of compression and this run compresses nothing."""
    kinds = {kind for name in reader.shapes() for kind in reader.kinds(name)}
    if not compresses and any(kind.partition("@")[0] == MEAN_ERROR for kind in kinds):
        LOG.warning(
            "%s holds error buffers of compressed gradients, and this run compresses none: what "
            "they hold back is dropped; to keep it, resume with its compress.rank on several "
            "replicas",
            reader.url,
        )


def _fixed(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that a resumed run must not change, by dotted name."""
    fixed: dict[str, Any] = {}
    for name, value in config.items():
        if (not prefix and name in _MAY_CHANGE) or (prefix == "loop." and name in _LOOP_MAY_CHANGE):
            continue
        if isinstance(value, dict):
            fixed.update(_fixed(value, f"{prefix}{name}."))
        else:
            fixed[prefix + name] = value
    return fixed
