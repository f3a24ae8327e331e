"""Evaluations that others can repeat: each suite writes one file, suite.json.

Start: registry.py: the suites; run.py: one suite from prompts to suite.json.
Imports: generation.evaluation and what it may.
"""
