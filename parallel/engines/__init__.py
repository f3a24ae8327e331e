"""Training engines with one protocol: plain torch, DeepSpeed ZeRO, DeepSpeed pipelines.

Start: protocol.py; reference.py is the plain one; error_buffers.py: what compression owes.
Imports: parallel, checkpoint, core.
"""
