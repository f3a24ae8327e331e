"""Encoded pictures -> RGB arrays -> squares.

Start: decode.py: the only decoder; crops.py: what a model sees.
Imports: core.
"""
