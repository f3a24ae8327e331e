"""Where data lives: a folder, or a bucket of an S3-compatible object store.

Start: store.py; s3.py for buckets, its retry policy in s3_retry.py, its messages in s3_messages.py.
Imports: core.
"""
