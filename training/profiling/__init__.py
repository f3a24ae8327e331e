"""Step-time profile of each rank, and its report.

Start: profile.py: measures during training; report.py: reads it afterwards.
Imports: training.config and training.run.
"""
