"""File names by which a model's folder is recognised; imports no torch."""

DESCRIPTION = "model.json"
"""A finished model's sizes, facts and digests."""
CHECKPOINTS = "checkpoints/step-*"
"""Checkpoints of a run that has not finished."""
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""An open_clip checkpoint, as the Hugging Face hub lays it out."""
