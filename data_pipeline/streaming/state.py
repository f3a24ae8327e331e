"""The position of a stream, which a checkpoint stores; valid for every number of ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.files.atomic import canonical_json, sha256


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """The position of a stream; the same on all ranks, and valid for every world size."""

    fingerprint: str
    seed: int
    batch: int
    lanes: int
    window: int
    version: int
    epoch: int
    step: int
    """Completed steps of this epoch."""
    passed: tuple[tuple[int, int], ...] = ()
    """(epoch, step) of batches to skip."""
    versions: tuple[tuple[int, str], ...] = ()
    """(first epoch, fingerprint) of each version of the data that the run reads, in order; () =
    `fingerprint` in all epochs. One of a later epoch will be taken up then."""

    @property
    def all_versions(self) -> tuple[tuple[int, str], ...]:
        """`versions`, also of a run that reads one."""
        return self.versions or ((0, self.fingerprint),)

    @property
    def fingerprints(self) -> list[str]:
        """That of the version, as of a mixture."""
        return [self.fingerprint]

    @property
    def firsts(self) -> list[str]:
        """That of the version that the run began with."""
        return [self.all_versions[0][1]]

    @property
    def begins_version(self) -> bool:
        """True after the first batch of a version that was taken up."""
        return self.step == 1 and self.epoch in [epoch for epoch, _ in self.versions[1:]]

    def version_at(self, epoch: int) -> str:
        """The fingerprint of the version that an epoch reads."""
        return [name for first, name in self.all_versions if first <= epoch][-1]

    def reading(self, versions: Iterable[tuple[int, str]]) -> "StreamState":
        """The same position, in a run that reads these versions."""
        state = replace(self, versions=tuple((epoch, name) for epoch, name in versions))
        return replace(state, fingerprint=state.version_at(self.epoch))

    def in_version(self, epoch: int, fingerprint: str) -> "StreamState":
        """The beginning of an epoch, and the version that it reads."""
        versions = self.versions
        if fingerprint != self.version_at(epoch):
            versions = (*self.all_versions, (epoch, fingerprint))
        return replace(self, epoch=epoch, step=0, fingerprint=fingerprint, versions=versions)

    def passing(self, batches: Iterable[tuple[int, int]]) -> "StreamState":
        """The same position, with these batches to skip."""
        return replace(self, passed=tuple(batches))

    def problems(self, other: "Position") -> list[str]:
        """Reasons why a run with this state cannot resume from `other`."""
        fixed = ("fingerprint", "seed", "batch", "lanes", "window", "version")
        return [
            f"the data's {name} was {getattr(other, name)}, now it is {getattr(self, name)}; "
            "give the same data and order settings, or start a new run folder"
            for name in fixed
            if getattr(self, name) != getattr(other, name)
        ]


@dataclass(frozen=True, kw_only=True)
class MixtureState:
    """The position of a mixture; the same on all ranks, and valid for every world size."""

    shares: tuple[str, ...]
    seed: int
    batch: int
    version: int
    step: int
    """Completed steps."""
    sets: tuple[StreamState, ...]
    """The position of each set's slowest lane."""
    passed: tuple[tuple[int, int], ...] = ()
    """(0, step) of batches to skip."""
    epoch: int = 0
    """A mixture has no epochs, its sets have."""

    @property
    def fingerprint(self) -> str:
        """That of all sets."""
        return mixed_fingerprint(self.fingerprints)

    @property
    def fingerprints(self) -> list[str]:
        """Those of the sets' versions."""
        return [each.fingerprint for each in self.sets]

    @property
    def firsts(self) -> list[str]:
        """Those of the versions that the run began with."""
        return self.fingerprints

    @property
    def all_versions(self) -> tuple[tuple[int, str], ...]:
        """None that the run took up: a mixture keeps the versions of its sets."""
        return ()

    @property
    def begins_version(self) -> bool:
        """False, as above."""
        return False

    def reading(self, versions: Iterable[tuple[int, str]]) -> "MixtureState":
        """The same position, as above."""
        return self

    @property
    def lanes(self) -> int:
        return self.sets[0].lanes

    @property
    def window(self) -> int:
        return self.sets[0].window

    def of(self, fingerprints: Sequence[str]) -> "MixtureState":
        """The same position in these versions of the sets."""
        sets = zip(self.sets, fingerprints, strict=True)
        return replace(self, sets=tuple(replace(s, fingerprint=name) for s, name in sets))

    def passing(self, batches: Iterable[tuple[int, int]]) -> "MixtureState":
        """The same position, with these batches to skip."""
        return replace(self, passed=tuple(batches))

    def problems(self, other: "Position") -> list[str]:
        """Reasons why a run with this state cannot resume from `other`."""
        fixed = ("fingerprint", "shares", "seed", "batch", "lanes", "window", "version")
        now, before = ({name: getattr(s, name, "") for name in fixed} for s in (self, other))
        return [
            f"the mixture's {name} was {before[name] or 'that of one data set'}, now it is "
            f"{now[name]}; give the same data and order settings, or start a new run folder"
            for name in fixed
            if now[name] != before[name]
        ]


Position = StreamState | MixtureState
"""The position of a stream or of a mixture."""


def position_of(body: dict[str, Any]) -> Position:
    """A position from a checkpoint's JSON."""
    for name in {"passed", "versions"} & body.keys():
        body = {**body, name: tuple(map(tuple, body[name]))}
    if "sets" not in body:
        return StreamState(**body)
    sets = tuple(position_of(each) for each in body["sets"])
    return MixtureState(**{**body, "sets": sets, "shares": tuple(body["shares"])})


def mixed_fingerprint(fingerprints: Sequence[str]) -> str:
    """The digest of several data sets in this order."""
    return sha256(canonical_json({"sets": list(fingerprints)}))
