"""Weights that a run starts from: another run's, carried over by name.

Start: weights.py: what a run loads; source.py: where it is; carry_over.py: the rules.
Imports: training.export, training.tasks, data_pipeline, parallel, checkpoint, core.
"""
