"""Settings of the demo; imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole way on this machine."""

    data: Literal["shapes", "emoji"] = "shapes"
    """Generated pictures with a checker, or real emoji (through npm)."""
    out: Path | None = None
    """Folder of the demo; default runs/demo (runs/demo-emoji for emoji)."""
    mesh: Literal["tp2pp2dp2", "1"] = "tp2pp2dp2"
    """How the prior trains: 8 ranks with tensor, pipeline and data parallelism and compressed
    gradients; 1 = every stage on one process."""
    size: Literal["tiny", "mini"] = "tiny"
    """tiny: minutes, pictures worth looking at. mini: a test of the plumbing."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs/demo" if self.data == "shapes" else f"runs/demo-{self.data}")
