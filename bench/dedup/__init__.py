"""Exact and near duplicates of a synthetic catalogue of 250 million rows (parent.py)."""

from bench.dedup.parent import run

__all__ = ["run"]
