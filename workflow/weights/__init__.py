"""`make weights`: train the models that come with Tapir, and write them with their cards.

Start: make.py trains and writes a set; recipes.py says how; `python -m workflow.weights` runs it.
Imports: generation, training and what is below them.
"""
