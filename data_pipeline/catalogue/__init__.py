"""The catalogue of a raw set: one parquet row a pair, and what is asked of the whole set.

Start: schema.py (the rows), duplicates.py (which pairs are left out), query.py (SQL).
Imports: data_pipeline's formats, sources, text and images.
"""
