"""One training loop for dVAE, prior and CLIP, with its configs, presets and run folders.

Start: trainer.py: the loop; stages.py: the stages; launch.py: starts the ranks.
Imports: data_pipeline, models, parallel, checkpoint, core; cluster's supervisor.
"""
