"""Batches in a reproducible order, with exact positions, whatever the number of ranks.

Start: order.py: which record at which step; stream.py: reading them.
Imports: data_pipeline.formats, core.
"""
