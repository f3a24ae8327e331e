"""Tensor parallelism: megatron-core's mappings, embedding and cross-entropy as our own layers.

Start: layers.py; ops.py: what one rank does without megatron-core.
Imports: parallel, core.
"""

import warnings

warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
