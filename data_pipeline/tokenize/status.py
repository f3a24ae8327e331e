"""Progress of a token job over all workers: of its ledgers while it runs, then of its manifests."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from core.errors import CorruptError, InputError
from core.storage.store import Store
from data_pipeline.formats.manifest import NAME, SPLITS, TOKENS, read_json, read_manifest
from data_pipeline.tokenize.leases import read_leases
from data_pipeline.tokenize.ledger import finished_shards


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
    if tokens.exists(f"{split}/{NAME}"):
        return _finished(tokens, split, expected)
    rejects: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    shards = samples = 0
    try:
        for _, record in finished_shards(tokens, f"{split}/"):
            shards += 1
            samples += record["shards"][0]["samples"]
            rejects.update(record["rejects"])
            if "numerics" in record:
                devices[record["numerics"]["device"]] += 1
    except (KeyError, IndexError, TypeError) as error:
        raise CorruptError(
            f"a record of {tokens.url}/{split}/ is damaged ({error}); run `tapir tokenize` with "
            "--again"
        ) from error
    leases = read_leases(tokens, f"{split}/")
    running = sum(lease["progress"].get("pairs", 0) for lease in leases)
    return SplitStatus(
        split=split,
        shards=expected["shards"],
        shards_done=shards,
        pairs=expected["pairs"],
        pairs_done=min(expected["pairs"], samples + rejects.total() + running),
        rejects=dict(rejects),
        finished=False,
        devices=dict(devices),
        workers=leases,
    )


def _finished(tokens: Store, split: str, expected: dict[str, int]) -> SplitStatus:
    manifest = read_manifest(tokens, f"{split}/", TOKENS)
    devices: Counter[str] = Counter()
    for row in manifest.numerics:
        devices[row["device"]] += row["shards"]
    return SplitStatus(
        split=split,
        shards=expected["shards"],
        shards_done=len(manifest.shards) // manifest.variants,
        pairs=expected["pairs"],
        pairs_done=manifest.samples + sum(manifest.rejects.values()),
        rejects=manifest.rejects,
        finished=True,
        devices=dict(devices),
        workers=read_leases(tokens, f"{split}/"),
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
            pairs = f", {done.get('pairs', 0)} of {done['of']}" if "of" in done else ""
            lines.append(
                f"  worker {lease['worker']} on {lease['holder']['host']}"
                f"{' (dead)' if lease['dead'] else ''}: {done.get('shard', 'starting')}{pairs}"
            )
    return "\n".join(lines)


REQUEST = "request.json"
