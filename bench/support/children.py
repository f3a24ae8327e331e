"""Processes of benchmarks: modules with a safe path, for a script's folder hides Python's modules.

`python -m bench.support.children MODULE:FUNCTION [JSON]...` calls one function with these
arguments.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.launcher import call_target

ROOT = Path(__file__).resolve().parents[2]


def module_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command line that runs a module; its environment is `child_environment`."""
    return [python, "-P", "-m", module, *arguments]


def call_command(target: str, *arguments: Any) -> list[str]:
    """The command line that calls `module:function` with arguments that JSON can hold."""
    return module_command("bench.support.children", target, *map(json.dumps, arguments))


def child_environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment that imports this tree from any folder, whose files shadow nothing."""
    paths = [str(ROOT), *filter(None, base.get("PYTHONPATH", "").split(os.pathsep))]
    return {**base, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}


def main(target: str, *arguments: str) -> None:
    """Call a function of a module."""
    call_target(target, *map(json.loads, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
