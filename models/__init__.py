"""The networks: dVAE, prior, CLIP, and counts of their parameters and FLOPs.

Start: config.py, then dvae.py and prior.py.
Imports: parallel, checkpoint, core.
"""
