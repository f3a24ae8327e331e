"""Pictures and numbers from finished models: sampling, ranking, evaluation.

Start: text_to_image.py: captions -> ranked pictures; sample.py: `tapir sample`.
Imports: planning, training and what is below them.
"""
