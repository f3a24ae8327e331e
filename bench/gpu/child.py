"""The process that runs some sections.

`python -m bench.gpu.child DEVICE SIZE NAME=MODULE:FUNCTION...` prints a JSON line for each row.
"""

import gc
import os
import sys
import time
import traceback

import torch

from bench.gpu.report import GpuReport
from cluster.launcher import call_target
from parallel.precision import set_numerics


def main(device: str, size: str, *sections: str) -> None:
    """Run sections; exits with 3 if the GPU no longer answers, which only a new process repairs."""
    if device == "cpu":
        torch.set_num_threads(1)  # a dry run; its times mean nothing, and others work beside it
    torch._dynamo.config.recompile_limit = 64  # more shapes than a run has
    report = GpuReport(torch.device(device), size == "tiny", os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # output of libraries must not mix with rows
    if report.device.type == "cuda":
        torch.cuda.set_device(0)
        report.device = torch.device("cuda", 0)
    for section in sections:
        name, _, target = section.partition("=")
        began = time.perf_counter()
        report.begin(name)
        set_numerics(report.device)
        try:
            call_target(target, report)
        except Exception as error:
            traceback.print_exc()
            report.failed("the section", f"{type(error).__name__}: {str(error)[:300]}")
        report.end(time.perf_counter() - began)
        _free(report.device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        os._exit(3)


if __name__ == "__main__":
    main(*sys.argv[1:])
