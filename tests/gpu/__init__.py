"""Tests of this kind; see tests/__init__.py."""
