"""How data sets are stored: shards, manifests, indexes, raw pairs and token records.

Start: manifest.py: what a data set is; shards.py: tars; tokens.py and raw.py: what is in them.
Imports: core; data_pipeline.images and text.
"""
