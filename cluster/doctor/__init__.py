"""Is this machine, cluster or store ready? Each finding with its fix.

Start: node.py: the checks of one node; finding.py: a row.
Imports: core, cluster.
"""
