"""Steps as they are run today: sharded weights, collectives beside the passes, fused kernels.

Starts at `running.py`: the options of a step. Imports planning.estimate's hardware, kernels and
collectives; knows no engine.
"""
