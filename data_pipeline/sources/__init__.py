"""Where raw image-caption pairs come from; each source yields `Pair`s.

Start: pair.py: one pair; catalogue.py: from the SRC of `tapir pack` to a source.
Imports: data_pipeline.images and text, core.
"""
