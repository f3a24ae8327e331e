"""The constants of `tapir plan --gpu cpu`, measured on this machine.

Start: calibrate.py.
Imports: planning.estimate and training.
"""
