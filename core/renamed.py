"""Old names of flags, config fields and stored keys, for all readers.

Writers use new names only. docs/decisions/021-names.md gives the reason of each row.
"""

from collections.abc import Mapping
from logging import INFO
from typing import Any

from core.log import LOG

RENAMED: dict[str, dict[str, str]] = {
    "LoopConfig": {"batch": "global_batch_size", "until": "stop_at"},
    "OptimConfig": {
        "decay_share": "decay_fraction",
        "least_gain": "plateau_threshold",
        "most_variance": "max_variance",
    },
    "EngineConfig": {"accumulate": "gradient_accumulation_steps"},
    "MeshConfig": {"machines": "nodes"},
    "OrderConfig": {"window": "shuffle_buffer"},
    "LoaderConfig": {"ahead": "prefetch"},
    "CheckpointConfig": {"hours": "keep_every_hours", "background": "async_save"},
    "GuardConfig": {
        "sigmas": "sigma_factor",
        "codes": "min_codebook_usage",
        "codes_after": "codebook_usage_after",
    },
    "SupervisorConfig": {"restarts": "max_restarts", "back_off": "backoff_seconds"},
    "DVAEConfig": {"least_log_scale": "min_log_scale", "start": "init"},
    "DVAETrain": {"tau_share": "tau_fraction", "beta_share": "beta_fraction"},
    "PriorTrain": {"caption_drop": "caption_dropout"},
    "BPETrain": {"most_captions": "max_captions"},
    "EvaluateConfig": {
        "most": "max_candidates",
        "few": "max_candidates_prompts",
        "scales": "guidance_scales",
        "guided": "guidance_prompts",
    },
    "ClusterFlags": {"a_node": "gpus_per_node", "cost_hour": "cost_per_hour"},
    "Resources": {"at_once": "parallelism"},
    "facts of a model": {"caption_drop": "caption_dropout"},
    "a row of metrics.jsonl": {
        "codes_share": "codebook_usage",
        "data_seconds": "data_wait_seconds",
        "data_seconds_p999": "data_wait_seconds_p999",
        "data_share": "data_wait_fraction",
        "ranks_at_once": "concurrent_ranks",
    },
    "a layout of plan --json": {"accumulate": "gradient_accumulation_steps"},
}
"""Config class (its fields are flags and keys of config.json and run files), or kind of stored
mapping -> old name -> new name."""
FACTS, ROW, LAYOUT = "facts of a model", "a row of metrics.jsonl", "a layout of plan --json"
_SHOWN, _PAGE = 10, "docs/decisions/021-names.md"
_told: set[str] = set()


def new_names(owner: type | str) -> dict[str, str]:
    """Old name -> new name of a config class and its bases, or of a kind of mapping."""
    if isinstance(owner, str):
        return RENAMED[owner]
    parts = [RENAMED.get(kind.__name__, {}) for kind in reversed(owner.__mro__)]
    return {old: new for part in parts for old, new in part.items()}


def renamed(owner: type | str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a stored mapping to new names; a new name wins over its old one."""
    return translated(new_names(owner), body)


def translated(names: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the keys of a mapping that are old names; a new name wins over its old one."""
    now = {names[name]: item for name, item in body.items() if name in names}
    return {**now, **{name: item for name, item in body.items() if name not in names}}


def tell_renamed(where: str, pairs: Mapping[str, str]) -> None:
    """Log a file's old names, once per file and process, on rank 0; at most `_SHOWN` of them."""
    if not pairs or where in _told or not LOG.isEnabledFor(INFO):  # only rank 0 logs at INFO
        return
    _told.add(where)
    lines = [f"{old} is now {new}" for old, new in pairs.items()]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more ({_PAGE})"]
    text = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
    LOG.warning("%s has old names, which are still read:%s", where, text)


def tell_old_keys(where: str, text: str, *owners: type | str) -> None:
    """`tell_renamed` for JSON text that holds mappings of these kinds."""
    names = {old: new for owner in owners for old, new in new_names(owner).items()}
    tell_renamed(where, {old: new for old, new in names.items() if f'"{old}":' in text})
