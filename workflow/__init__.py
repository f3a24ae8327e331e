"""Join the stages of a run: run files, the demo, chains of jobs, reports and summaries.

Start: run_file.py: a run as one file; chain/ sends it to a cluster; demo.py walks all stages.
Imports: generation, planning, training and what is below them; cluster.
"""
