"""Raw pairs -> WebDataset shards, filtered and split by key.

Start: pack.py.
Imports: data_pipeline's sources, formats, text and images.
"""
