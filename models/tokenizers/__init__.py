"""Image tokenizers: pictures <-> a grid of codes, of whatever origin, behind one protocol.

Start: protocol.py: what all others know of one; registry.py: the kinds, and plug-ins.
Imports: models, core; diffusers (the extra `tokenizers`) when a VQ network is built.
"""
