"""Kubernetes: a driver Job in the cluster creates each stage's object when it is its turn.

Start: driver.py: the rounds of the driver; stages.py: the object of a stage.
Imports: core and the rest of cluster; the driver needs the standard library and PyYAML only.
"""
