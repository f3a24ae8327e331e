"""Ranks, meshes, precisions, gradient compression and the training engines.

Start: mesh.py and world.py: who am I; engines/protocol.py: what an engine does.
Imports: checkpoint, core.
"""
