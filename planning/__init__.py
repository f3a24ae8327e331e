"""Predict a run before it is paid for: memory, time, and whether all ranks' collectives match.

Start: estimate/ for `tapir plan`, rehearsal/ for `tapir rehearse`, calibration/ for this machine.
Imports: training and what is below it.
"""
