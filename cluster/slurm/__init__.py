"""Slurm: batch scripts, their submission, and what a running job asks of Slurm.

Start: script.py: the script of a stage; submit.py sends it; job.py, nodes.py and watch.py are used
by `tapir job` on the nodes.
Imports: cluster's jobs, core.
"""
