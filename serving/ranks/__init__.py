"""The ranks that decode a model's pictures, and the server's link to them.

Start: worker.py: the loop of a rank; group.py: start, watch and restart the ranks.
Imports: generation and what is below it; group.py and messages.py import no torch.
"""
