"""Progress of a token job over all workers."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from core.errors import InputError
from core.storage.store import Store
from data_pipeline.formats.manifest import NAME, SPLITS, read_json
from data_pipeline.tokenize.leases import read_leases


@dataclass(frozen=True, kw_only=True)
class SplitStatus:
    """One split of a token job."""

    split: str
    shards: int
    shards_done: int
    pairs: int
    pairs_done: int
    """Pairs of finished shards, plus the last reported progress of running ones."""
    rejects: dict[str, int]
    finished: bool
    """True if the manifest exists."""
    devices: dict[str, int]
    """Finished shards by the device that encoded them."""
    workers: list[dict[str, Any]]
    """worker, holder and progress of each lease; a dead worker's lease stays until taken over."""


def job_status(tokens: Store) -> list[SplitStatus]:
    """Read the status of a token job from its output store.

    Raises: InputError if there is none.
    """
    if not tokens.exists(REQUEST):
        raise InputError(f"there is no token job at {tokens.url}; start it with `tapir tokenize`")
    counts = read_json(tokens, REQUEST).get("input")
    if not isinstance(counts, dict):
        raise InputError(f"{tokens.url} is not the place of a token job; give that of its tokens")
    return [_split_status(tokens, split, counts[split]) for split in SPLITS]


def _split_status(tokens: Store, split: str, expected: dict[str, int]) -> SplitStatus:
    names = tokens.names(f"{split}/{DONE}")
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda name: read_json(tokens, name), names))
    rejects: dict[str, int] = {}
    for record in records:
        for kind, count in record["rejects"].items():
            rejects[kind] = rejects.get(kind, 0) + count
    devices = Counter(row["numerics"]["device"] for row in records if "numerics" in row)
    leases = read_leases(tokens, f"{split}/")
    running = sum(lease["progress"].get("pairs", 0) for lease in leases)
    finished = sum(record["shards"][0]["samples"] for record in records)
    return SplitStatus(
        split=split,
        shards=expected["shards"],
        shards_done=len(names),
        pairs=expected["pairs"],
        pairs_done=min(expected["pairs"], finished + sum(rejects.values()) + running),
        rejects=rejects,
        finished=tokens.exists(f"{split}/{NAME}"),
        devices=dict(devices),
        workers=leases,
    )


def describe_status(rows: list[SplitStatus]) -> str:
    """Format a status for the terminal."""
    lines = []
    for row in rows:
        alive = [lease for lease in row.workers if not lease["dead"]]
        state = "finished" if row.finished else "running" if alive else "nobody works on it"
        lines.append(
            f"{row.split}: {row.shards_done} of {row.shards} shards, {row.pairs_done} of "
            f"{row.pairs} pairs, rejects {row.rejects or 'none'}; {state}"
        )
        if row.devices:
            made = (f"{count} by {device}" for device, count in sorted(row.devices.items()))
            lines.append(f"  shards encoded: {', '.join(made)}")
        for lease in row.workers:
            done = lease["progress"]
            lines.append(
                f"  worker {lease['worker']} on {lease['holder']['host']}"
                f"{' (dead)' if lease['dead'] else ''}: "
                f"{done.get('shard', 'starting')}, {done.get('pairs', 0)} of {done.get('of', '?')}"
            )
    return "\n".join(lines)


DONE, REJECTS = "_done/", "_rejects/"


REQUEST = "request.json"
