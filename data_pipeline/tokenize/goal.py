"""Which version of the raw pairs a token job encodes, as which version of the token set.

A version that was begun is finished first; then the newest raw version becomes the next version of
the tokens, which shares all finished shards. All workers agree, since the first request counts.
"""

from dataclasses import dataclass
from typing import Any

from core.errors import InputError
from core.storage.store import Store
from data_pipeline.formats.manifest import (
    RAW,
    SPLITS,
    TOKENS,
    Manifest,
    manifest_name,
    newest_manifests,
    read_manifest,
)
from data_pipeline.jobs.request import claimed, newest_version


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the workers make."""

    version: int
    """Of the token set."""
    raw: dict[str, Manifest]
    """The splits that are encoded."""
    is_newest: bool
    """False if the raw pairs have a newer version."""

    def result(self, split: str) -> str:
        """The object that is written last."""
        return f"{split}/{manifest_name(self.version)}"

    def parent(self, tokens: Store, split: str) -> Manifest | None:
        """The version before."""
        before = self.version - 1
        return read_manifest(tokens, f"{split}/", TOKENS, before) if before else None


def claim_goal(raw: Store, tokens: Store, facts: dict[str, Any], again: bool) -> Goal:
    """Claim TOKENS for the raw pairs and models, or join the job that did.

    Raises: InputError if TOKENS holds tokens of other pairs or models.
    """
    newest = newest_manifests(raw, RAW)
    number = max(1, newest_version(tokens))
    request = claimed(tokens, number, _request(facts, newest), again)
    while request != _request(facts, newest):
        begun = _begun(raw, tokens, newest, request, facts)
        goal = Goal(version=number, raw=begun, is_newest=False)
        if not all(tokens.exists(goal.result(split)) for split in SPLITS):
            return goal
        number += 1
        request = claimed(tokens, number, _request(facts, newest), again)
    return Goal(version=number, raw=newest, is_newest=True)


def _request(facts: dict[str, Any], raw: dict[str, Manifest]) -> dict[str, Any]:
    counts = {
        split: {"shards": len(manifest.shards), "pairs": manifest.samples}
        for split, manifest in raw.items()
    }
    fingerprints = {split: manifest.fingerprint for split, manifest in raw.items()}
    return {**facts, "raw": fingerprints, "input": counts}


def _begun(
    raw: Store,
    tokens: Store,
    newest: dict[str, Manifest],
    request: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Manifest]:
    """The earlier raw version that a request is for."""
    earlier = newest["train"].earlier
    asked = request.get("raw", {}).get("train")
    if asked in earlier:
        number = earlier.index(asked) + 1
        begun = {split: read_manifest(raw, f"{split}/", RAW, number) for split in SPLITS}
        if request == _request(facts, begun):
            return begun
    raise InputError(
        f"{tokens.url} holds tokens of other pairs, or of another dVAE, tokenizer, block "
        "size, precision (in 16 bits: device) or number of variants; choose an empty place for "
        "the tokens"
    )
