"""The verbs that answer HTTP.

Start: study.py. Imports: serving and core.
"""
