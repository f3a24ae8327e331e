"""Models as safetensors + JSON: finished models, the Hugging Face layout, OpenAI's dVAE.

Start: weights.py: open a model; save.py: write that of a run; files.py: its files.
Imports: training.run, training.ema, models, checkpoint.
"""
