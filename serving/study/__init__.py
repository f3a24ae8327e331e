"""People compare two sets of pictures, blind: `tapir study make | links | serve | results`.

Start: study.py says what raters are shown; votes.py keeps what they answer.
Imports: serving.security, generation and below.
"""
