"""What happens to a step that must not count, and tools to find out why.

Start: guards.py: is an update a spike; rewind.py: skip it or go back; replay.py and diverge.py:
why.
Imports: training.trainer and what is below it.
"""
