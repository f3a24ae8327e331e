"""Steps that a prior started from another's weights (`--init`) needs for a fresh one's loss."""

from bench.finetune.parent import run

__all__ = ["run"]
