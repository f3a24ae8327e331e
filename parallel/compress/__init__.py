"""Gradient compression on plain tensors; knows no engine.

Start: powersgd.py: reduce gradients as low-rank factors; advisor.py: is it worth it.
Imports: parallel, core.
"""
