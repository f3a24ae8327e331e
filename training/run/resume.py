"""Checks of a resumed run against its checkpoint."""

from typing import Any

from checkpoint.format import MEAN_ERROR
from checkpoint.reader import CheckpointReader
from core.config import to_json
from core.errors import ConfigError
from core.log import LOG
from parallel.engines.protocol import Engine
from parallel.precision import Numerics
from training.config import StageConfig
from training.run.resume_with import changes_of
from training.stages import STAGES, config_with_new_names

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
    "resume_with",
)
"""Settings that a resumed run may change."""
CHANGED = "resume-with"
"""The event of a run's history that names a setting changed on purpose."""
_LOOP_MAY_CHANGE = ("stop_at", "log_every", "validate_every", "validation_samples")


def accept_config(reader: CheckpointReader, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a run's settings with those of its checkpoint.

    Returns an event for the run's history for each setting that `resume_with` changed.
    Raises: ConfigError with a table of the settings that changed and must not.
    """
    stored = config_with_new_names(reader.facts["config"], reader.url)
    before, now = _fixed(_with_defaults(stored)), _fixed(config)
    purpose = changes_of(config["resume_with"])
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    rows = [(n, str(before.get(n)), str(now.get(n))) for n in changed if n not in purpose]
    if rows:
        rows.insert(0, ("setting", "in the checkpoint", "now"))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        raise ConfigError(
            f"{reader.url} was written with other settings; give the same ones, another --out, or "
            "change them on purpose with --resume-with SETTING=VALUE,...:\n" + "\n".join(table)
        )
    step = int(reader.facts["step"])
    return [
        {
            "event": CHANGED,
            "step": step,
            "setting": name,
            "before": before.get(name),
            "now": now.get(name),
        }
        for name in changed
    ]


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of settings that its version of Tapir did not have."""
    entry = STAGES.get(str(stored.get("stage")))
    return _merged(to_json(entry.settings()), stored) if entry else stored


def _merged(defaults: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {**defaults, **over}
    nested = [name for name, value in defaults.items() if isinstance(value, dict) and name in over]
    return {**both, **{name: _merged(defaults[name], over[name]) for name in nested}}


def refuse_other_shapes(reader: CheckpointReader, engine: Engine) -> None:
    """Raise ConfigError if the checkpoint lacks a tensor of the engine in its shape."""
    stored, mine = reader.shapes(), engine.shapes()
    wrong = sorted(set(mine.items()) - set(stored.items()))[:3]
    if wrong:
        raise ConfigError(f"{reader.url} holds other tensors than this model: {wrong} ...")


def refuse_changes(settings: StageConfig) -> None:
    """Raise ConfigError for a new run that changes settings on purpose."""
    if settings.resume_with:
        raise ConfigError(
            f"resume_with={settings.resume_with!r}: {settings.out} has no checkpoint to resume "
            "from; give these settings as their own flags"
        )


def tell_differences(
    reader: CheckpointReader, changes: list[dict[str, Any]], numerics: Numerics, compresses: bool
) -> None:
    """Log how the resumed run differs from the one that wrote its checkpoint."""
    for change in changes:
        LOG.info("changed on purpose: %s from %s to %s", *map(change.get, _CHANGE))
    tell_other_numerics(reader, numerics)
    tell_dropped_errors(reader, compresses)


_CHANGE = ("setting", "before", "now")


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
