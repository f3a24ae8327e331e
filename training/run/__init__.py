"""The run folder: config, metrics, checkpoints, and resuming from them.

Start: folder.py: the owner's side; metrics.py: the rows for readers.
Imports: training.config, checkpoint, core.
"""
