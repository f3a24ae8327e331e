"""The engines over DeepSpeed; the only package that imports it.

Start: zero.py and pipe.py; hooks.py attaches compression.
Imports: parallel.engines, parallel.compress, parallel.tensor.
"""
