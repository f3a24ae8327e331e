"""Shipped models: a folder for each set, with its card, digests, prior, dVAE, CLIP and tokenizer.

Start: generation/shipped.py reads them; `make weights` (workflow/weights/) writes them.
Imports: nothing.
"""
