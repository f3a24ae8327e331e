"""Checkpoints by global parameter name, readable by any mesh.

Start: format.py: the format; config.py; saver.py, writer.py, reader.py.
Imports: core.
"""
