"""Tests of training/export/transformers.py, custom_code/ and push.py."""
