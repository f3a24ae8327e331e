"""What a suite gets and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from core.files.atomic import Json
from core.workers import JobWorker
from generation.config import ModelPaths
from generation.text_to_image import Studio


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the user gave besides the settings."""

    data: str
    """DATA; empty if none was given."""
    models: ModelPaths
    digests: dict[str, str]
    """Digests of the models by role."""
    out: Path
    """The suite's folder; a suite may keep files there to go on from."""
    device: torch.device
    """Device of the networks that judge."""
    member: JobWorker
    """This process among the job's workers."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of a suite."""

    results: Json
    """All figures; the same bits on any batch size."""
    headline: dict[str, float]
    """Figures for the leaderboard; rows are ordered by the first one."""


class Prepared(Protocol):
    """A suite whose data are open and whose prompts are chosen."""

    prompts: list[Json]
    """A row a prompt, as JSON: its caption, and what else the suite needs to judge it."""
    facts: Json
    """What else decides the figures: fingerprints of data, digests of judging networks."""

    def measure(self, studio: Callable[[], Studio]) -> Measured:
        """Draw and judge. `studio` opens the models at its first call."""


Prepare = Callable[[Inputs, object, list[Json] | None], Prepared]
"""Opens data and chooses prompts; given prompts (of a file to repeat) are used instead."""
