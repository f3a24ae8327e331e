"""Models as safetensors + JSON: finished models, the Hugging Face layout, OpenAI's dVAE.

Start: weights.py: write and open a model.
Imports: training.run, training.ema, models, checkpoint.
"""
