"""A rehearsal of a run's life: start, checkpoints, lost ranks, a preemption, the end.

Start: life.py: one world's life; rank.py: what its ranks run; curves.py: costs over world sizes.
Imports: planning.start_up, planning.rehearsal, training and what is below it.
"""
