"""Figures of drawn pictures: caption accuracy, FID, IS, and overlap of data sets.

Start: evaluate.py: caption accuracy; score_job.py: FID and IS on many workers.
Imports: generation.sampling and what generation may.
"""
