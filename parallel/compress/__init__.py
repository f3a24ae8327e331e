"""Gradient compression on plain tensors; knows no engine."""
