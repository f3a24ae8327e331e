"""Where the time of each rank's steps goes, and the report of it.

Start: profile.py: measured while a run trains; report.py: read afterwards.
Imports: training.config and training.run.
"""
