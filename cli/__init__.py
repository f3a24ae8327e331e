"""The verbs of `tapir`, one file per family: each parses flags, calls one function and prints.

Start: tapir.py names the function of each verb; data.py is the shortest.
Imports: every package below; nobody imports it but tapir.py.
"""
