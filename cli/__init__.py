"""The verbs of `tapir`: one file a family of verbs; each parses flags, calls one function below and
prints.

Start: tapir.py names the function of each verb; data.py is the shortest.
Imports: every package below; nobody imports it but tapir.py.
"""
