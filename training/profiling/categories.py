"""What the time of a step is spent on: the names that profiles and plans share; no torch."""

COMPUTE = "compute"
"""Forward, backward and what the engine does beside them, without waits for other ranks."""
TENSOR = "tensor"
"""Collectives of the ranks that share each matmul."""
PIPELINE = "pipeline"
"""Transfers between stages: see BUBBLE for what is beyond them."""
DATA = "data"
"""Gradient reduction, ZeRO's gathers and everything else between replicas; waits for a replica
that is behind are in it."""
BUBBLE = "bubble"
"""What a stage waits for other stages. An operation between stages (a send, a receive, or a
collective over all ranks of a pipeline) takes as long as its transfer would, if the other side were
ready, and the rest is bubble. The transfer is taken to be the shortest time that this rank has seen
an operation of that kind, group and size take in this run. The end of a step is in it, too: there
the early stages wait in the reduction of the norm."""
DATA_WAIT = "data_wait"
"""Waiting for records, and making tensors of them in the training loop."""
OPTIMIZER = "optimizer"
"""The optimiser's update of weights and moments."""
CHECKPOINT = "checkpoint"
"""What a save holds training up: all of it unless it is written in the background."""
VALIDATION = "validation"
"""Passes over held-out data; a plan has none."""
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
"""What a rank does by itself: a rank that is slow here holds the others up."""
UNDIVIDED = (DATA_WAIT, CHECKPOINT, VALIDATION)
"""What is done inside of these counts as theirs, collectives, too."""
OF_GROUP = {"tensor": TENSOR, "pipeline": PIPELINE, "data": DATA, "machine": DATA, "between": DATA}
"""Group of the ledger -> category of its operations; those of other groups are OTHER."""
