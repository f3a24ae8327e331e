"""One training loop for dVAE, prior and CLIP, with its configs, presets and run folders.

Start: trainer.py: the loop; stages.py: what can be trained; launch.py: how ranks start.
Imports: data_pipeline, models, parallel, checkpoint, core; cluster's supervisor.
"""
