"""Counts of collectives by group and operation, and those of the tensor group.

Start: tally.py; `planning.estimate.traffic` adds up a whole step.
Imports: planning.estimate, models, parallel.
"""
