"""The networks: dVAE, prior with its masks, CLIP, and counts of what they cost."""
