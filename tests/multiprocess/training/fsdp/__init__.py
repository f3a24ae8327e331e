"""Tests of engine torch."""
