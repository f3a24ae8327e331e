"""Batches in a reproducible order with exact resume positions, for any number of ranks.

Start: order.py: the record order; stream.py: reads the records.
Imports: data_pipeline.formats, core.
"""
