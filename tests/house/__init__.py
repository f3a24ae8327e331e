"""Static checks of the repository itself: import circles, sizes of files and folders, names.

Start: __main__.py; rules.py holds every limit.
Imports: nothing of Tapir's; the sources are parsed, never imported.
"""
