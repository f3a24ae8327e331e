"""Tests of training/run/trackers."""
