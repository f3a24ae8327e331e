"""Measurements of planning, on real ranks."""
