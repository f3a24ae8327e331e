"""From a run file to jobs on this machine, Slurm or Kubernetes.

Start: stages.py: a run file becomes a chain; submit.py sends it.
Imports: what workflow may.
"""
