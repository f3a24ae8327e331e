"""What the start of a world costs: CPU seconds of ranks, requests of the store and of the data.

Start: model.py: the costs on a mesh; light_ranks.py: ranks without a model that measure them.
Imports: training and what is below it.
"""
