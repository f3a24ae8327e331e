"""Acceptance on one GPU: figures, the target of each, and whether it was reached.

`python -m bench gpu --json [--device cpu --tiny] [--out DIR] [--only A,B] [--budget SECONDS]`.
Sections run one after another in a process of their own; one that fails, crashes or takes too long
is a failed row, and the others go on in a new process. Rows are written as they come. Times are the
GPU's own, by events; peaks are measured in the same run, on random numbers: matmuls of ones or
zeros are faster than those of data. Targets of speed are judged on GPUs at full size alone.
"""

from bench.gpu.parent import run

__all__ = ["run"]
