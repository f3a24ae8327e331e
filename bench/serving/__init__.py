"""Serving: pictures a second of a running batch."""

from bench.serving.throughput import run

__all__ = ["run"]
