"""The end of a token job over 125,000 shards: requests, memory and seconds (parent.py)."""

from bench.token_finish.parent import run

__all__ = ["run"]
