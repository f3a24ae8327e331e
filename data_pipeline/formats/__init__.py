"""How data sets are stored: shards, manifests, indexes, raw pairs and token records.

Start: manifest.py: the data set; shards.py: its tars; tokens.py and raw.py: their records; views/:
which of them, and where.
Imports: core; data_pipeline.images, text and sources, and packing.filters.
"""
