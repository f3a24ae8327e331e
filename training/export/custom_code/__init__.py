"""What `tapir export` copies beside the weights: Tapir's models for `transformers`, without Tapir.

Start: modeling_tapir.py. Tapir itself imports none of it.
Imports: torch, transformers; nothing of Tapir.
"""
