"""What a run will need, before it is paid for: memory, time, and whether all ranks agree.

Start: estimate/ for `tapir plan`, rehearsal/ for `tapir rehearse`, calibration/ for this machine.
Imports: training and what is below it.
"""
