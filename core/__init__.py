"""Errors, configs, files, object stores and logs; imports no torch.

Start: errors.py, then config.py; files/ and storage/.
Imports: nothing of Tapir's.
"""
