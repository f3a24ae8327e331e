"""The manifest of a data set: its shards with counts and digests, under one fingerprint."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from core.config import to_json
from core.errors import CorruptError, InputError
from core.files.atomic import canonical_json, damaged, sha256
from core.storage.store import Store

NAME, INDEX = "manifest.json", "index.safetensors"
SPLITS = ("train", "validation")
NEWEST = 0
"""In place of a version's number."""
EARLIER = "earlier"
"""The fact that lists the fingerprints of earlier versions; the first version has none."""
RAW = "tapir-raw-3"
TOKENS = "tapir-tokens-2"
_READABLE = {RAW: (RAW, "tapir-raw-2"), TOKENS: (TOKENS,)}
"""Formats of each kind that are read; a raw set of format 2 has no masks and no places."""
_DERIVED = ("numerics", "figures", "lookup")
"""Fields outside the fingerprint, left out of the file while they are empty."""
_TOGETHER = 1000
"""Shards that are serialised together."""
_DIGEST_LINE = re.compile(rb'\n( "digest": "([0-9a-f]{64})",\n)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar of a data set, with the index beside it or, read in place, beside the manifest."""

    name: str
    samples: int
    blocks: int
    """Runs of records, each read in one request."""
    bytes: int
    sha256: str
    etag: str
    """Of an object store that gives one; a folder has none."""
    index_sha256: str
    """Of the index beside it; empty in views, which have none."""
    pairs: int = 0
    """Pairs that its blocks hold, if the mask leaves some out; 0 = all of them are records."""
    place: str = ""
    """Path or URL of the tar, if it is not beside the manifest."""
    archive: str = ""
    """What the keys begin with, if it is a tar of another program; such tars are read in place."""
    captions: str = ""
    """Caption filters of a tar of another program (FilterConfig as JSON); empty = none."""

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index.safetensors"

    @property
    def shown(self) -> str:
        """Its name, or where it is, for messages."""
        return self.place or self.name

    @property
    def is_whole(self) -> bool:
        """True if the tar is beside the manifest and all of its pairs are records."""
        return not (self.place or self.pairs)

    @property
    def content(self) -> str:
        """What identifies its records in the fingerprint of the data set."""
        return " ".join(filter(None, (self.sha256, self.archive, self.captions)))


_SHARD_KEYS = {row.name for row in fields(Shard)}
_REQUIRED = {row.name for row in fields(Shard) if row.default is MISSING}


def shard_json(shard: Shard) -> dict[str, Any]:
    """A shard's entry in manifests and records of workers, without empty optional fields."""
    body: dict[str, Any] = to_json(shard)
    return {name: value for name, value in body.items() if value or name in _REQUIRED}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An immutable data set."""

    format: str
    """RAW or TOKENS."""
    shards: list[Shard]
    """Shards in order, grouped by variant."""
    samples: int
    facts: dict[str, Any]
    """What the data was made from: source, split, dVAE hash, tokenizer hash, grid, ..."""
    rejects: dict[str, int]
    """Left-out pairs by reason."""
    index_sha256: str
    """Digest of index.safetensors, the block index."""
    variants: int = 1
    """Token sets of different crops of the same pairs; epoch e reads variant e % variants."""
    numerics: list[dict[str, Any]] = field(default_factory=list)
    """How tokens were computed (parallel.precision.Numerics), with the number of input shards for
    each; not in the fingerprint, since fp32 codes of all devices are comparable."""
    figures: dict[str, float] = field(default_factory=dict)
    """Statistics of the records that validation reports: per_position_entropy."""
    lookup: dict[str, Any] = field(default_factory=dict)
    """sha256 and bits of ids.bin (ids.py); older data sets have none."""

    @property
    def earlier(self) -> list[str]:
        """Fingerprints of the earlier versions of a growing data set, in order."""
        return list(self.facts.get(EARLIER, ()))

    @property
    def version(self) -> int:
        """Number of this version, from 1 on."""
        return 1 + len(self.earlier)

    def file(self, name: str) -> str:
        """The name of its index or ids: `name`; of later versions index-000002.safetensors etc."""
        return name if self.version == 1 else versioned(name, self.version)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that a reader sees; equal data sets have equal fingerprints."""
        body = self.body()
        for name in _DERIVED:
            body.pop(name, None)
        return sha256(canonical_json({**body, "shards": [s.content for s in self.shards]}))

    def body(self) -> dict[str, Any]:
        """The fields of the file but for the shards, without derived ones that are empty."""
        body: dict[str, Any] = to_json(replace(self, shards=[]))
        return {n: value for n, value in body.items() if value or n not in _DERIVED}


def versioned(name: str, version: int) -> str:
    """`manifest.json` -> `manifest-000001.json`."""
    stem, _, ending = name.partition(".")
    return f"{stem}-{version:06d}.{ending}"


def manifest_name(version: int) -> str:
    """The object that is written last for a version."""
    return NAME if version == 1 else versioned(NAME, version)


def read_json(store: Store, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises: CorruptError, naming the file, if it is not a JSON object.
    """
    try:
        body = json.loads(store.get(name))
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise CorruptError(
            f"{store.url}/{name} is damaged; mend it by the command that made it, with --again"
        )
    return body


def write_manifest(store: Store, prefix: str, manifest: Manifest) -> None:
    """Write the manifest, sealed with its own digest; call it after all other files are written.

    manifest.json is the newest version; if there are several, each is also manifest-000001.json
    and so on, which is written last.
    """
    first = prefix + versioned(NAME, 1)
    if manifest.version == 2 and not store.exists(first):
        store.put(first, store.get(prefix + NAME))
    body = {**manifest.body(), "fingerprint": manifest.fingerprint}
    digest = hashlib.sha256()
    for part in _json_parts(body, manifest.shards):
        digest.update(part)
    sealed = {**body, "digest": digest.hexdigest()}
    has_later = store.exists(prefix + versioned(NAME, manifest.version + 1))
    names = [] if has_later else [NAME]
    if has_later or manifest.version > 1:
        names.append(versioned(NAME, manifest.version))
    for name in names:
        store.put_parts(prefix + name, _json_parts(sealed, manifest.shards))


def _json_parts(body: dict[str, Any], shards: list[Shard]) -> Iterator[bytes]:
    """`canonical_json` of a body and its shards, in parts: 100,000 shards are 50 MB of text."""
    if not shards:
        yield canonical_json(body)
        return
    mark = b'"shards": [\n'
    before, _, after = canonical_json({**body, "shards": [0]}).partition(mark + b"  0")
    yield before + mark
    for first in range(0, len(shards), _TOGETHER):
        part = [canonical_json(shard_json(shard)) for shard in shards[first : first + _TOGETHER]]
        rows = b",\n".join(b"  " + row[:-1].replace(b"\n", b"\n  ") for row in part)
        yield rows + (b",\n" if first + _TOGETHER < len(shards) else b"")
    yield after


def kind_of(store: Store, prefix: str) -> str:
    """RAW or TOKENS: the kind of a split's data set; RAW if its format is neither's.

    Raises: CorruptError if the manifest is damaged.
    """
    name = _unseal(store.get(prefix + NAME), f"{store.url}/{prefix}{NAME}").get("format")
    return next((kind for kind, names in _READABLE.items() if name in names), RAW)


def read_manifest(store: Store, prefix: str, kind: str, version: int = NEWEST) -> Manifest:
    """Read and check the manifest of a data set of this format; `version`: one before the newest.

    Raises: InputError if there is none or it is of another kind; CorruptError if it is damaged.
    """
    manifest = _read(store, prefix + NAME, kind)
    if version in (NEWEST, manifest.version):
        return manifest
    if version > manifest.version:
        raise InputError(
            f"{store.url}/{prefix} has no version {version}; the newest is {manifest.version}"
        )
    return _read(store, prefix + versioned(NAME, version), kind)


def newest_manifests(store: Store, kind: str) -> dict[str, Manifest]:
    """The manifests of the newest version that both splits have, by split.

    Raises: as `read_manifest`.
    """
    newest = {split: read_manifest(store, f"{split}/", kind) for split in SPLITS}
    version = min(manifest.version for manifest in newest.values())
    return {
        split: manifest
        if manifest.version == version
        else read_manifest(store, f"{split}/", kind, version)
        for split, manifest in newest.items()
    }


def version_of(store: Store, newest: Manifest, fingerprint: str) -> int:
    """The number of the version that has this fingerprint.

    Raises: InputError if it is not a version of this data set.
    """
    versions = [*newest.earlier, newest.fingerprint]
    if fingerprint not in versions:
        raise InputError(
            f"the data set at {store.url} is another one: it has no version {fingerprint[:12]}, "
            f"which this run reads (it has {', '.join(name[:12] for name in versions[-5:])}); give "
            "the place that has it as --data, or start a new run folder"
        )
    return versions.index(fingerprint) + 1


def _read(store: Store, name: str, kind: str) -> Manifest:
    where = f"{store.url}/{name}"
    verb = "pack" if kind == RAW else "tokenize"
    if not store.exists(name):
        raise InputError(f"there is no data set at {where}; make it with `tapir {verb}`")
    body = _unseal(store.get(name), where)
    fingerprint = body.pop("fingerprint")
    if body.get("format") not in _READABLE[kind]:
        raise InputError(
            f"{where} has the format {body.get('format')!r}; this needs {kind!r}: make it with "
            f"`tapir {verb}` of this version, in an empty place"
        )
    manifest = Manifest(**body)
    if manifest.fingerprint != fingerprint:
        raise CorruptError(f"{where}: the fingerprint does not match the shards listed")
    return manifest


def _unseal(data: bytes, where: str) -> dict[str, Any]:
    """`unseal` without a second copy of the text; shards become `Shard`s as they are parsed.

    Raises: CorruptError if a byte changed since it was written.
    """
    line = _DIGEST_LINE.search(data)
    if line is None:
        raise damaged(where)
    digest = hashlib.sha256(memoryview(data)[: line.start(1)])
    digest.update(memoryview(data)[line.end(1) :])
    if digest.hexdigest() != line[2].decode():
        raise damaged(where)
    body: dict[str, Any] = json.loads(data, object_hook=_as_shard)
    del body["digest"]
    return body


def _as_shard(row: dict[str, Any]) -> Any:
    return Shard(**row) if _REQUIRED <= row.keys() <= _SHARD_KEYS else row
