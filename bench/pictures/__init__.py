"""Pictures decoded ahead of a step of given length: by threads, by processes, and by the step."""

from bench.pictures.turns import run

__all__ = ["run"]
