"""`tapir` as forks of one process that has imported what its verbs import: seconds become 20 ms.

`python -m tests.warm FD` takes requests from a socket, each with a file for output and errors. A
forkserver that a fork starts is a fork of this process as well, so that it has none of the verb's
state.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from multiprocessing import util
from typing import Any, NoReturn

import tapir
from cluster.processes import die_with_parent

_MESSAGE = 2**20
_ABOVE = 500
"""File descriptors from here on are nobody's."""


class Warm:
    """The client's end: one command at a time."""

    def __init__(self, preload: list[str], environment: dict[str, str]) -> None:
        self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.warm", str(theirs.fileno()), *preload]
        self._server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self.free = threading.Lock()

    def run(
        self, arguments: tuple[str, ...], environment: dict[str, str], timeout: float
    ) -> tuple[int, str]:
        """Exit code and output of `tapir ARGUMENTS`."""
        request = json.dumps([arguments, environment]).encode()
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            socket.send_fds(self._mine, [request], [output.fileno(), errors.fileno()])
            self._mine.settimeout(timeout)
            try:
                answer = self._mine.recv(_MESSAGE)
            except TimeoutError:
                self._server.kill()  # its forks end with it
                raise
            text = b""
            for file in (output, errors):
                file.seek(0)
                text += file.read()
        assert answer, f"{arguments}: the process that runs commands ended"
        return json.loads(answer), text.decode()


def main(number: str, *preload: str) -> None:
    """Fork for each request, until the client is gone."""
    channel = socket.socket(fileno=int(number))
    for name in [*preload, *(place.split(":")[0] for place, _ in tapir.VERBS.values())]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while True:
        request, files, *_ = socket.recv_fds(channel, _MESSAGE, 2)
        if not request:
            return
        pid = os.fork()
        if not pid:
            _be_tapir(*json.loads(request), files, channel)
        for file in files:
            os.close(file)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        channel.send(json.dumps(code).encode())


def _be_tapir(
    arguments: list[str], environment: dict[str, str], files: list[int], channel: socket.socket
) -> NoReturn:
    die_with_parent()
    channel.close()
    null = os.open(os.devnull, os.O_RDONLY)
    for target, file in enumerate([null, *files]):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    _replace_forkserver()
    sys.argv = ["tapir", *arguments]
    code: Any = 0
    try:
        runpy.run_module("tapir", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)


def _replace_forkserver() -> None:
    """Replace a forkserver by a fork of the current process that waits for its command."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        mine.close()
        _be_forkserver(its)
    its.close()
    start = util.spawnv_passfds

    def spawn(path: bytes, arguments: list[Any], files: list[int]) -> int:
        if "multiprocessing.forkserver" not in str(arguments[-1]):
            return start(path, arguments, files)
        socket.send_fds(mine, [json.dumps([arguments[-1], list(files)]).encode()], files)
        mine.close()
        return pid

    util.spawnv_passfds = spawn


def _be_forkserver(channel: socket.socket) -> NoReturn:
    message, files, *_ = socket.recv_fds(channel, _MESSAGE, 8)
    if not message:
        os._exit(0)
    source, numbers = json.loads(message)
    above = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for file in files]
    os.closerange(3, _ABOVE)
    for file, number in zip(above, numbers, strict=True):
        os.dup2(file, number)
    os.closerange(_ABOVE, _ABOVE + 16)
    try:
        exec(source, {"__name__": "__main__"})
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
