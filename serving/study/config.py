"""Settings of `tapir study`; imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from generation.config import SampleConfig


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of `tapir study make`: what raters compare, and how often."""

    captions: Path | None = None
    """Text file with a caption a line; needed for two runs. Default: the captions that both sets
    have, or those of the one set of pictures."""
    count: int = 0
    """Captions of the study, chosen by --seed; 0 = all."""
    votes: int = 5
    """Raters who compare the pictures of each caption (the paper: 5)."""
    per_rater: int = 0
    """Captions that one rater compares, at most; 0 = all."""
    catch_every: int = 10
    """A catch trial after so many captions, at a random place among them: a picture beside the same
    one with its pixels shuffled; 0 = none."""
    catch_least: float = 0.75
    """Raters with a lower share of right answers in catch trials are left out of the results."""
    draw: SampleConfig = field(default_factory=SampleConfig)
    """How runs draw; the seed also decides sides and order."""

    def problems(self) -> list[str]:
        problems = self.draw.problems()
        if self.votes < 1:
            problems.append(f"votes={self.votes} must be at least 1; the paper has 5")
        for name in ("count", "per_rater", "catch_every"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)} must not be negative; 0 is allowed")
        if not 0 <= self.catch_least <= 1:
            problems.append(f"catch_least={self.catch_least} must be a share, 0 to 1")
        return problems


@dataclass(frozen=True, kw_only=True)
class StudyServer:
    """Where `tapir study serve` listens."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all. The links are the access: send them as secrets, over
    https (a proxy) outside your own network."""
    port: int = 8001
    """Port to listen on; 0 = a free one."""
    hosts: tuple[str, ...] = ()
    """Names of this server that raters use beside addresses and localhost, e.g. of a proxy."""

    def problems(self) -> list[str]:
        if not 0 <= self.port < 2**16:
            return [f"port={self.port} must be 0 to 65535; 0 is a free one"]
        return []
