"""`python -m cluster.kubernetes CHAIN_FILE TOKEN_FOLDER`: the driver's process, in its pod."""

import signal
import sys
from pathlib import Path
from types import FrameType

from cluster.chain import parse_submitted
from cluster.kubernetes.client import ApiClient
from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.driver import Driver
from core.config import from_json
from core.errors import EXIT_PREEMPTED, InputError, TapirError
from core.log import LOG, set_up_logging


def main(arguments: list[str]) -> int:
    """Returns 0 if all stages succeeded; 2 or 70 end the driver's Job, other codes restart it."""
    set_up_logging(0)
    signal.signal(signal.SIGTERM, _stop)  # the first process of a pod has no default action
    try:
        if len(arguments) != 2:
            raise InputError("usage: python -m cluster.kubernetes CHAIN_FILE TOKEN_FOLDER")
        path, folder = map(Path, arguments)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        submitted = parse_submitted(data, str(path))
        config = from_json(KubernetesConfig, submitted.settings)
        return Driver(submitted.chain, config, ApiClient(folder)).run()
    except TapirError as error:
        LOG.error("%s", error)
        error.give_up()
        return error.exit_code


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
