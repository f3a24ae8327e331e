"""How a pipeline is cut into stages, and the order of its passes; imports no torch.

Start: schedules.py.
Imports: nothing of Tapir.
"""
