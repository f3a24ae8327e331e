"""Encoded pictures -> RGB arrays -> squares.

Start: decode.py: the only decoder; crops.py: the crops that models are given.
Imports: core.
"""
