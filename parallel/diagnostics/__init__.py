"""Checks of ranks that meet, and a record of their last collectives.

Start: checks.py: what `tapir doctor` asks of ranks; flight_recorder.py.
Imports: parallel, core.
"""
