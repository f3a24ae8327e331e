"""Jobs on this machine, Slurm and Kubernetes; launching and supervising ranks. No torch.

Start: chain.py: jobs as values; slurm/, kubernetes/, local.py render them.
Imports: core only.
"""
