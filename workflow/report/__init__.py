"""What a run gave: a page of pictures, findings, curves and costs, and the leaderboard.

Start: page.py writes report.html; summary.py gathers the figures.
Imports: what workflow may.
"""
