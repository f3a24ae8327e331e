"""Benchmarks: `python -m bench NAME --json`; ratios of one run, interleaved, with their spread."""
