"""What a rank of engine `torch` holds and sends: FSDP2's units, and the vectors beside them.

Start: layout.py.
Imports: planning.estimate.layers, training.config.
"""
