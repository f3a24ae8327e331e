"""Checks of a resumed run against its checkpoint."""

from collections.abc import Set
from typing import Any

from checkpoint.format import MEAN_ERROR
from checkpoint.reader import CheckpointReader
from checkpoint.tensors import Shapes
from core.config import to_json
from core.errors import ConfigError
from core.log import LOG
from parallel.precision import Numerics
from training.config import StageConfig
from training.run.resume_with import changes_of, leaves
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
    "track",
    "supervisor",
    "resume_with",
    "init_bpe",
    "rfid",
    "perceptual.vgg",
    "perceptual.linear",
    "loop.stop_at",
    "loop.log_every",
    "loop.validate_every",
    "loop.validation_samples",
)
"""Settings, and groups of settings, that a resumed run may change; files may have moved."""
CHANGED = "resume-with"
"""The event of a run's history that names a setting changed on purpose."""
_GUMBEL, _DISCRIMINATOR = ("model.quantizer", "gumbel"), "discriminator.weight"
_ONLY_WITH: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("tau_first", "tau_last", "tau_fraction"), _GUMBEL),
    **dict.fromkeys(("beta_first", "beta", "beta_fraction"), _GUMBEL),
    "commitment": ("model.quantizer", "vq"),
    "model.vector": ("model.quantizer", "vq"),
    "model.levels": ("model.quantizer", "fsq"),
}
"""Settings that have an effect only while another one has this value."""
_ONLY_ABOVE_0 = {
    "discriminator.start": _DISCRIMINATOR,
    "discriminator.width": _DISCRIMINATOR,
    "discriminator.layers": _DISCRIMINATOR,
    "lora.alpha": "lora.rank",
    "optim.ema_every": "optim.ema",
    "optim.patience": "optim.halvings",
    "optim.plateau_threshold": "optim.halvings",
}
"""Settings that have an effect only while another one is above 0."""


def accept_config(reader: CheckpointReader, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a run's settings with those of its checkpoint.

    Returns an event for the run's history for each setting that `resume_with` changed.
    Raises: ConfigError with a table of the settings that changed and must not.
    """
    stored = config_with_new_names(reader.facts["config"], reader.url)
    all_before, all_now = leaves(_with_defaults(stored)), leaves(config)
    before, now = _fixed(all_before), _fixed(all_now)
    purpose = changes_of(config["resume_with"])
    compared = {*before, *now} - ((_unused(before) | _unused(now)) - purpose.keys())
    changed = [name for name in sorted(compared) if before.get(name) != now.get(name)]
    rows = [(n, str(before.get(n)), str(now.get(n))) for n in changed if n not in purpose]
    if rows:
        rows.insert(0, ("setting", "in the checkpoint", "now"))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        raise ConfigError(
            f"{reader.url} was written with other settings; give the same ones, another --out, or "
            "change them on purpose with --resume-with SETTING=VALUE,...:\n" + "\n".join(table)
        )
    if now.get(_DISCRIMINATOR) and not before.get(_DISCRIMINATOR):
        raise ConfigError(
            f"resume_with: {_DISCRIMINATOR}={now[_DISCRIMINATOR]} adds a discriminator, whose "
            f"tensors {reader.url} does not hold; start a new run with --init {reader.url}"
        )
    step = int(reader.facts["step"])
    return [
        {
            "event": CHANGED,
            "step": step,
            "setting": name,
            "before": all_before.get(name),
            "now": all_now.get(name),
        }
        for name in sorted({*changed, *purpose})
        if all_before.get(name) != all_now.get(name)
    ]


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of settings that its version of Tapir did not have."""
    entry = STAGES.get(str(stored.get("stage")))
    return _merged(to_json(entry.settings()), stored) if entry else stored


def _merged(defaults: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {**defaults, **over}
    nested = [name for name, value in defaults.items() if isinstance(value, dict) and name in over]
    return {**both, **{name: _merged(defaults[name], over[name]) for name in nested}}


def refuse_misfits(reader: CheckpointReader, shapes: Shapes, frozen: Set[str]) -> None:
    """Check that a checkpoint holds the tensors of an engine, with moments of those it trains.

    Raises: ConfigError naming some that it lacks.
    """
    stored = reader.shapes()
    wrong = [
        f"{name} is {_size(stored.get(name))} there and {_size(shape)} here"
        for name, shape in sorted(shapes.items())
        if stored.get(name) != shape
    ]
    if wrong:
        raise ConfigError(
            f"{reader.url} holds other tensors than this model ({_some(wrong)}); give the settings "
            f"and the data that it was written with, or start a new run with --init {reader.url}"
        )
    still = [name for name in sorted(shapes.keys() - frozen) if "exp_avg" not in reader.kinds(name)]
    if still:
        before = reader.facts["config"].get("freeze", "")
        raise ConfigError(
            f"{reader.url} has no moments of {len(still)} tensors that its run froze "
            f"({_some(still)}), so that they stay frozen when it resumes; give freeze={before!r}, "
            f"or start a new run with --init {reader.url}"
        )


def _size(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "1"


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f", ... {len(texts)} in all" * (len(texts) > _SHOWN))


_SHOWN = 3


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


def _unused(fixed: dict[str, Any]) -> set[str]:
    """Those of the settings that another one leaves without effect."""
    unused = {name for name, (other, value) in _ONLY_WITH.items() if fixed.get(other) != value}
    return unused | {name for name, other in _ONLY_ABOVE_0.items() if not fixed.get(other)}


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings, by dotted name, that a resumed run must not change."""
    return {
        name: value
        for name, value in settings.items()
        if name not in _MAY_CHANGE and name.partition(".")[0] not in _MAY_CHANGE
    }
