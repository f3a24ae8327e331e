"""Memory and time of a training step on a mesh, by arithmetic.

Start: search.py: all meshes, the fastest that fits; memory.py and step_time.py: one mesh.
Imports: training.config and presets, models, parallel's configs.
"""
