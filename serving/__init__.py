"""Models behind HTTP: the page of `tapir serve`, the images API, and who may call them.

Start: app.py: the routes; worker.py: requests of many people in one running batch.
Imports: generation and what is below it.
"""
