"""Recovery from bad steps, and tools to analyse them.

Start: guards.py: detects spikes; rewind.py: skips a step or goes back to a checkpoint; replay.py
and diverge.py: analyse a step.
Imports: training.trainer and the modules below it.
"""
