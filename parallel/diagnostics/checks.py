"""Checks of `tapir doctor` that need torch: its build, the devices, and a burn-in on every rank."""

import importlib.metadata
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist

from cluster.doctor.finding import Finding, bad, here, ok, placed
from cluster.doctor.outliers import Burned, burn_rows
from core.gpus import gpu_devices
from parallel.device import wait_for
from parallel.world import World

SIDE, SIDE_GPU = 512, 8192
REDUCED, REDUCED_GPU = 4 * 2**20, 64 * 2**20
SENT, SENT_GPU = 2**20, 16 * 2**20
"""fp32 values of the all-reduce, and of one message to the next rank."""
REPEATS = 3


def torch_findings(world: World) -> list[Finding]:
    """torch itself, the devices of this rank, the backends, and DeepSpeed's version."""
    rows = [_version(), *_devices(world), _backends(), _deepspeed()]
    return placed(rows, world.rank)


def burn_in(world: World, seconds: float) -> list[Finding]:
    """Matmuls, an all-reduce and messages in a ring; on rank 0 the rows, elsewhere none.

    Raises: RuntimeError if a collective fails.
    """
    device = world.device
    with torch.inference_mode(), _one_dtype(device):
        world.barrier()
        rate = _matmuls(device, seconds)
        link = _ring(world, device) if world.size > 1 else 0.0
        reduce = _all_reduce(world, device) if world.size > 1 else 0.0
    mine = Burned(rank=world.rank, host=here(), rate=rate, link=link, reduce=reduce)
    texts = world.gather_text(json.dumps(asdict(mine)))
    if world.rank:
        return []
    return placed(burn_rows([Burned(**json.loads(text)) for text in texts]), 0)


def _version() -> Finding:
    installed = importlib.metadata.version("torch")
    if torch.__version__.partition("+")[0] != installed.partition("+")[0]:
        text = f"torch {torch.__version__} runs, but {installed} is what is installed first"
        fix = f"two torches are on the path: keep one (this one is {torch.__file__})"
        return bad("torch", text, fix)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    return ok("torch", f"torch {torch.__version__} for {built}")


def _devices(world: World) -> list[Finding]:
    there, seen = len(gpu_devices()), torch.cuda.device_count()
    if not there and not seen:
        return [ok("devices", f"a CPU, {torch.get_num_threads()} threads a rank")]
    if not torch.cuda.is_available():
        text = f"torch sees none of {there} GPUs"
        fix = "match torch's CUDA with the driver (nvidia-smi), and see CUDA_VISIBLE_DEVICES"
        return [bad("devices", text, fix)]
    return [ok("devices", torch.cuda.get_device_name(world.device))]


def _backends() -> Finding:
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    needed = ["gloo", *(["nccl"] if gpu_devices() else [])]
    missing = [name for name in needed if not there[name]]
    if missing:
        text = f"torch was built without {', '.join(missing)}"
        return bad("backends", text, "install the build of torch that is made for this machine")
    return ok("backends", f"torch has {', '.join(name for name, has in there.items() if has)}")


def _deepspeed() -> Finding:
    """Check DeepSpeed's version: hooks.py uses private API of the tested one."""
    try:
        from parallel.engines.deepspeed import hooks  # noqa: PLC0415 - a check: it may fail
    except Exception as error:
        text = f"deepspeed cannot be imported: {type(error).__name__}: {error}"
        return bad("deepspeed", text, "pip install the versions of constraints/cpu.txt")
    version = importlib.metadata.version("deepspeed")
    if version not in hooks.TESTED:
        text = f"deepspeed {version} is installed; tested is {', '.join(hooks.TESTED)}"
        return bad("deepspeed", text, f"pip install deepspeed=={hooks.TESTED[-1]}")
    return ok("deepspeed", f"deepspeed {version}, as tested")


@contextmanager
def _one_dtype(device: torch.device) -> Iterator[None]:
    """Run in bf16 on GPUs, in fp32 on CPUs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _matmuls(device: torch.device, seconds: float) -> float:
    """FLOP/s of consecutive matmuls; another job on the same core or GPU lowers it."""
    side = SIDE_GPU if device.type == "cuda" else SIDE
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    out = a @ b
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken) < REPEATS:
        wait_for(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        wait_for(device)
        taken.append(time.perf_counter() - began)
    return 2 * side**3 * len(taken) / sum(taken)


def _ring(world: World, device: torch.device) -> float:
    """Bytes/s from this rank to the next and back; links that share a rank take turns.

    Two ranks have one link, which counts for the first: the second returns 0.
    """
    values = torch.ones(SENT_GPU if device.type == "cuda" else SENT, device=device)
    links = world.size if world.size > 2 else 1
    rate = 0.0
    for turn in (0, 1, 2):
        world.barrier()
        mine = [link for link in range(links) if _turn(link, links) == turn]
        for link in mine:
            other = (link + 1) % world.size
            if world.rank == link:
                rate = _there_and_back(values, other, device)
            elif world.rank == other:
                for _ in range(REPEATS + 1):
                    dist.recv(values, link)
                    dist.send(values, link)
    return rate


def _turn(link: int, links: int) -> int:
    """The turn of a link: links of one turn share no rank; an odd ring needs a third turn."""
    return 2 if links % 2 and link == links - 1 and links > 1 else link % 2


def _there_and_back(values: torch.Tensor, other: int, device: torch.device) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        dist.send(values, other)
        dist.recv(values, other)
        wait_for(device)
        taken.append(time.perf_counter() - began)
    return 2 * values.nbytes / min(taken[1:])


def _all_reduce(world: World, device: torch.device) -> float:
    """Bytes/s that each rank sends in a ring all-reduce.

    Raises: RuntimeError if the sum is wrong.
    """
    values = torch.empty(REDUCED_GPU if device.type == "cuda" else REDUCED, device=device)
    taken = []
    for _ in range(REPEATS + 1):
        values.fill_(float(world.rank == 0))
        world.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        wait_for(device)
        taken.append(time.perf_counter() - began)
    if not bool((values == 1).all()):
        raise RuntimeError("the all-reduce gave a wrong sum")
    share = 2 * (world.size - 1) / world.size
    return share * values.nbytes / min(taken[1:])
