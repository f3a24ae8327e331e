"""Kills the process that imports it, as the kernel does when memory runs out."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
