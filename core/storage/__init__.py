"""Where data lives: a folder, or a bucket of an S3-compatible object store.

Start: store.py; s3.py for buckets.
Imports: core.
"""
