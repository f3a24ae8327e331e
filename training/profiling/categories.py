"""Categories of step time, shared by profiles and plans; imports no torch."""

COMPUTE = "compute"
"""Forward, backward and other work of the engine, without waits for other ranks."""
TENSOR = "tensor"
"""Collectives of tensor parallelism."""
PIPELINE = "pipeline"
"""Transfers between pipeline stages; waits beyond the transfer are BUBBLE."""
DATA = "data"
"""Gradient reduction, ZeRO's gathers and other operations between replicas, including waits for a
slower replica."""
BUBBLE = "bubble"
"""Waits of a pipeline stage for other stages. An operation between stages (a send, a receive, or a
collective over all ranks of a pipeline) is split into its transfer and the bubble. The transfer
time is the shortest duration on this rank in this run of an operation with the same group, name and
size. At the end of a step the early stages wait in the reduction of the gradient norm; that is
bubble, too."""
DATA_WAIT = "data_wait"
"""Waits for records, and their conversion to tensors in the training loop."""
OPTIMIZER = "optimizer"
"""The optimiser's update of weights and moments."""
CHECKPOINT = "checkpoint"
"""Time for which a save blocks training: all of it unless it is written in the background."""
VALIDATION = "validation"
"""Validations; a plan has none."""
OTHER = "other"
"""Python outside of the engine: reports, guards, averages."""
CATEGORIES = (
    COMPUTE,
    TENSOR,
    PIPELINE,
    DATA,
    BUBBLE,
    DATA_WAIT,
    OPTIMIZER,
    CHECKPOINT,
    VALIDATION,
    OTHER,
)
OWN = (COMPUTE, DATA_WAIT, OPTIMIZER, OTHER)
"""A rank's own work; a rank that is slow here delays the others."""
UNDIVIDED = (DATA_WAIT, CHECKPOINT, VALIDATION)
"""Categories that include all nested work, also collectives."""
OF_GROUP = {"tensor": TENSOR, "pipeline": PIPELINE, "data": DATA, "machine": DATA, "between": DATA}
"""Ledger group -> category of its operations; other groups are OTHER."""
