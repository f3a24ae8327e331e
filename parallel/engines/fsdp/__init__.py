"""The engine on torch's own stack: FSDP2 inside a machine, overlapped reductions between machines.

Start: engine.py; units.py: what is sharded; buckets.py: how gradients are reduced.
Imports: parallel, checkpoint, core.
"""
