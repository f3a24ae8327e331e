"""A job of any number of workers: leases, markers of what is done, and one finisher.

Start: worker.py: the job; ledger.py: what is done; finish.py: its end; status.py: its progress.
Imports: core, data_pipeline.formats.
"""
