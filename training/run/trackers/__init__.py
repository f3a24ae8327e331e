"""Trackers: where a run's figures, pictures and histograms go beside metrics.jsonl.

Starts at writer.py, which feeds the trackers of `--track`; each is one class of protocol.py.
May import core only: tracker libraries are imported when they are used.
"""
