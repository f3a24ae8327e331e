"""How many ranks a launcher started, and where they may meet.

Imports no torch.
"""

import os
import socket
from collections.abc import Mapping

from core.ranks import check_launch


def ranks_given(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks torchrun, mpirun, srun or our launcher started; None if nobody did.

    Raises: InputError with every launcher's variable that is odd, or lacks the others it needs.
    """
    found = check_launch(environment)
    return found.size if found else None


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens at now; "" = on every address of this machine."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])
