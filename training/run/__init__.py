"""The folder of a run: config, metrics, checkpoints, and how a run resumes from them.

Start: folder.py: one owner at a time; metrics.py: the rows that everybody reads.
Imports: training.config, checkpoint, core.
"""
