"""The position of a stream, which a checkpoint stores; valid for every number of ranks."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


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

    def problems(self, other: "StreamState") -> list[str]:
        """Reasons why a run with this state cannot resume from `other`."""
        fixed = ("fingerprint", "seed", "batch", "lanes", "window", "version")
        return [
            f"the data's {name} was {getattr(other, name)}, now it is {getattr(self, name)}; "
            "give the same data and order settings, or start a new run folder"
            for name in fixed
            if getattr(self, name) != getattr(other, name)
        ]
