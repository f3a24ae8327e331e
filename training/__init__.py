"""One loop for dVAE, prior and CLIP; configs, presets, metrics and run folders."""
