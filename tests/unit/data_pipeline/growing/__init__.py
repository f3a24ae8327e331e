"""Tests of growing data sets."""
