"""Settings of `tapir demo`; imports no torch."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEMO_SETS = ("shapes", "emoji")
LEAST_MINUTES = 3
"""Below it, starting the commands would take most of a demo's time."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `tapir demo`: all stages on this machine."""

    data: str = "shapes"
    """shapes (generated pictures with a checker), emoji (through npm), or your own pairs: a folder
    of pictures, each with a NAME.txt beside it, or what else `tapir pack` reads."""
    minutes: float = 0.0
    """Of your own pairs: the time that the demo may take; it chooses pixels, codes, sizes and steps
    that fit this machine and the pairs. 0 = 30 minutes."""
    out: Path | None = None
    """Folder of the demo; default runs/demo, else runs/demo-emoji or runs/demo-FOLDER."""
    mesh: Literal["tp2pp2dp2", "1"] = "tp2pp2dp2"
    """Mesh of the prior's last part: training starts on 2 ranks and resumes from their checkpoint
    on 8 ranks with tensor, pipeline and data parallelism and compressed gradients. 1 = every stage
    on one process, also used if there are fewer GPUs than ranks."""
    size: Literal["tiny", "mini"] = "tiny"
    """tiny: minutes, pictures worth looking at. mini: a test of the plumbing."""
    seed: int = 0
    """Seed of all training and of the draws; all seeds have the same data."""

    @property
    def own(self) -> bool:
        """True for pairs of the user's own."""
        return self.data not in DEMO_SETS

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        name = re.sub(r"[^\w-]+", "-", Path(self.data).name.lower()).strip("-") or "own"
        return Path("runs/demo" if self.data == "shapes" else f"runs/demo-{name}")

    def problems(self) -> list[str]:
        problems = []
        local = "://" not in self.data and not any(mark in self.data for mark in "*?[{,")
        if self.own and local and not Path(self.data).exists():
            problems.append(
                f"data={self.data!r} is neither one of {', '.join(DEMO_SETS)} nor a folder of "
                "pictures with captions; give the folder's path"
            )
        if self.minutes and not LEAST_MINUTES <= self.minutes < math.inf:
            problems.append(f"minutes={self.minutes:g} must be at least {LEAST_MINUTES}")
        if self.minutes and not self.own:
            problems.append(f"minutes is for your own pairs; {self.data} has fixed sizes")
        return problems
