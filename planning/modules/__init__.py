"""`tapir plan --estimate FILE.py:build`: memory and time of any torch module on a mesh.

Starts at `estimate.py`; `record.py` runs a step on fake tensors. Imports planning.estimate.
"""
