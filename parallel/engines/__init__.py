"""Training engines with one protocol: plain torch, DeepSpeed ZeRO, DeepSpeed pipelines.

Start: protocol.py; reference.py is the plain one.
Imports: parallel, checkpoint, core.
"""
