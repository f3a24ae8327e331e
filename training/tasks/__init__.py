"""Tasks of the training loop: batches, losses and validation figures of each stage.

Start: task.py: the protocol; prior.py, dvae.py and clip.py implement it.
Imports: data_pipeline, models, parallel; training.config, schedules and data_requirements.
"""
