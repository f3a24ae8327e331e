"""All ranks' collectives, recorded from the real training loop on fake tensors and matched.

Start: rehearse.py: a rehearsal; rank.py: one rank; matcher.py: do the ranks' calls match.
Imports: training and what is below it.
"""
