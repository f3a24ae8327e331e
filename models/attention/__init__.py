"""Block-sparse attention: the paper's masks, its kernels on CPUs and GPUs, rotary positions.

Start: masks.py: who attends to whom; banded.py: on CPUs; flexible.py: on GPUs.
Imports: models.config, parallel, core.
"""
