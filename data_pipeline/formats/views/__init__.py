"""Sets that own no bytes: which pairs are records, and where the tars are.

Start: masks.py: a bit for each pair; places.py: shards at another place.
Imports: core; data_pipeline.formats.manifest.
"""
