"""Settings of the suites; imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from generation.config import SampleConfig, ScoreConfig


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(SampleConfig):
    """Settings of the suite shapes."""

    prompts: int = 256
    """Held-out captions, chosen by --seed; 0 = all."""

    def problems(self) -> list[str]:
        return super().problems() + _few("prompts", self.prompts, "all")


@dataclass(frozen=True, kw_only=True)
class GenevalConfig(SampleConfig):
    """Settings of the suite geneval-style."""

    candidates: int = 4
    """Pictures of each prompt, as in GenEval; all of them are judged, none is chosen by rank."""
    per_task: int = 36
    """Prompts of each task, chosen by --seed; all captions of the task if it has fewer."""

    def problems(self) -> list[str]:
        few = [f"per_task={self.per_task} must be at least 2"] * (self.per_task < 2)
        return super().problems() + few


@dataclass(frozen=True, kw_only=True)
class ClipscoreConfig(SampleConfig):
    """Settings of the suite clipscore."""

    captions: int = 256
    """Captions, chosen by --seed; 0 = the usual number of the set."""
    judge: Path | None = None
    """Folder with an open_clip checkpoint that scores the pictures; without it, the CLIP of the run
    does: a proxy, which is not comparable with published figures."""

    def problems(self) -> list[str]:
        return super().problems() + _few("captions", self.captions, "the usual number of the set")


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(SampleConfig):
    """Settings of the suite best-of-n."""

    candidates: int = 512
    """Pictures drawn for each caption; N is 1, 2, 4, ... up to this."""
    captions: int = 64
    """Captions, chosen by --seed."""
    repeats: int = 8
    """Disjoint groups of N candidates, at most, over which FID and IS of each N are averaged."""
    inception: Path | None = None
    """Inception's weights as safetensors; without them, FID and IS are computed from the features
    of the run's CLIP: a proxy, which is not comparable with published figures."""

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.captions < 2:
            problems.append(
                f"captions={self.captions} must be at least 2: a FID needs two pictures"
            )
        if self.repeats < 1:
            problems.append(f"repeats={self.repeats} must be at least 1")
        return problems


@dataclass(frozen=True, kw_only=True)
class PanelsConfig(SampleConfig):
    """Settings of the suite panels."""

    candidates: int = 1
    """Pictures of each prompt; all of them are judged, none is chosen by rank."""
    temperature: float = 0.5
    """Divides the logits; 0 = the most likely code. Low, since each prompt has one right answer."""
    per_operation: int = 40
    """Prompts of each operation, with different upper panels, chosen by --seed."""

    def problems(self) -> list[str]:
        few = [f"per_operation={self.per_operation} must be at least 2"] * (self.per_operation < 2)
        return super().problems() + few


@dataclass(frozen=True, kw_only=True)
class FidConfig(ScoreConfig):
    """Settings of the suites coco, cub and pairs."""

    inception: Path | None = None
    """Inception's weights as safetensors; without them, a proxy is computed from CLIP's features,
    which is not comparable with published figures."""
    overlap: Path | None = None
    """overlap.json of `tapir overlap RAW DATA`; adds a score without those pictures."""


def _few(name: str, count: int, none: str) -> list[str]:
    """A problem of a number of captions that cannot be shuffled."""
    few = count < 0 or count == 1
    text = f"{name}={count} must be at least 2, which can be shuffled for `chance`; 0 = {none}"
    return [text] * few
