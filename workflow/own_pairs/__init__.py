"""`tapir demo --data FOLDER`: the demo on a user's own pairs, sized to them and to a time.

Start: demo.py walks the stages; sizes.py chooses pixels, codes and steps from measured seconds.
Imports: generation, planning, training and what is below them.
"""
