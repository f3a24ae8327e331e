"""Captions as text and as tokens: clean-up, BPE, BPE dropout.

Start: captions.py, then bpe.py.
Imports: core.
"""
