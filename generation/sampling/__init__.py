"""Drawing image tokens from a prior with a KV cache, on one rank or a mesh.

Start: sampler.py: the loop over tokens; decoder.py: one step of the network.
Imports: models, parallel and what is below them; training.export for weights.
"""
