"""From raw image-caption pairs to batches: packing, streaming and the token job.

Start: packing/pack.py, then streaming/order.py, then tokenize/worker.py; jobs/worker.py runs them.
Imports: models, parallel, checkpoint, core.
"""
