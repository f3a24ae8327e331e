"""Pictures that Tapir draws itself, and the programs that read them.

Start: shapes.py: figures and captions; panels.py: two of them in one picture.
Imports: data_pipeline.sources, images and text, core.
"""
