"""Files and folders that appear whole or not at all, on any file system.

Start: atomic.py.
Imports: core.
"""
