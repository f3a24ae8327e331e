"""The images API of a server under load."""

from bench.serve_load.parent import run

__all__ = ["run"]
