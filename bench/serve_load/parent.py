"""`tapir serve` under load: 50 clients, 500 requests through the images API.

Each picture is compared byte for byte with the one that `tapir sample` draws for its key. The
baseline of the throughput is the same server with a batch of one row; the latency's is the median
of requests for as many pictures. Memory is that of all of the server's processes after half and
after all of 1,000 requests. The same on 2 tensor x 2 pipeline ranks. Untrained models of the demo's
sizes: speed does not depend on what was learned.
"""

import base64
import contextlib
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bench.support.children import ROOT, child_environment, module_command
from bench.support.rows import Row, bench_row
from bench.support.sizes import sized
from bench.support.untrained import write_untrained
from core.errors import TapirError
from generation.config import ModelPaths
from models.config import DVAEConfig, PriorConfig

CLIENTS, REQUESTS, FEW = sized(50, 3), sized(500, 8), sized(100, 4)
"""FEW: requests of the baseline with one row, and of 4 ranks."""
FEWEST = sized(20, 2)
"""Of 4 ranks with one row."""
ROWS = sized(32, 4)
COUNTS, SEEDS = (1, 2, 4), (0, 1)
CAPTIONS = [f"{n} {colour} {shape}" for n in ("a", "two", "three", "four", "five")
            for colour, shape in (("red", "circles"), ("blue", "squares"))]  # fmt: skip
DVAE = sized(
    DVAEConfig(width=16, bottleneck=1, codebook=64),
    DVAEConfig(pixels=16, width=4, codebook=16, code_width=8),
)
PRIOR = sized(
    PriorConfig(dim=192, heads=6, layers=4, text_length=24),
    PriorConfig(dim=16, heads=2, layers=2, text_length=8),
)
_ADDRESS = re.compile(r"page: (http://\S+)/")
_LONGEST = 1800.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request."""

    caption: str
    seed: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a number of requests took."""

    pictures: int
    seconds: float
    latencies: dict[int, list[float]]
    """By the number of pictures of a request."""
    wrong: int
    """Pictures that are not those of `tapir sample`, and failed requests."""

    @property
    def rate(self) -> float:
        return self.pictures / self.seconds

    @property
    def tails(self) -> list[float]:
        """p99 over median, of requests for equally many pictures."""
        return [
            statistics.quantiles(each, n=100, method="inclusive")[98] / statistics.median(each)
            for each in self.latencies.values()
            if len(each) > 1
        ]


def run() -> list[Row]:
    """Rows of pictures/s, tail latency, wrong pictures and memory."""
    with tempfile.TemporaryDirectory() as name:
        models = write_untrained(Path(name), CAPTIONS, DVAE, PRIOR, dropout=0)
        expected = _expected(models, Path(name))
        with _served(Path(name), f"--rows={ROWS}") as (address, process):
            many = _load(address, expected, REQUESTS)
            half = _memory(process)
            again = _load(address, expected, REQUESTS)
            whole = _memory(process)
        with _served(Path(name), "--rows=1") as (address, _):
            one = _load(address, expected, FEW)
        with _served(Path(name), f"--rows={ROWS}", "--tensor=2", "--pipeline=2") as (address, _):
            ranks = _load(address, expected, FEW)
        with _served(Path(name), "--rows=1", "--tensor=2", "--pipeline=2") as (address, _):
            slow = _load(address, expected, FEWEST)
    baseline = f"batch of one row: {one.rate:.2f}, target 3x"
    rates = [many.rate / one.rate, again.rate / one.rate]
    tails = many.tails + again.tails
    below = [2 / tail for tail in tails]
    wrong = many.wrong + again.wrong + one.wrong
    return [
        bench_row(f"pictures/s, {CLIENTS} clients", many.rate, "1/s", baseline, rates),
        bench_row("p99 over median at equal N", max(tails), "", "at most 2", below),
        bench_row("wrong pictures or errors", wrong, "", "0", [float(not wrong)]),
        bench_row("memory after all requests", whole / 1e6, "MB", "after half", [half / whole]),
        bench_row("pictures/s, 2 tensor x 2 pipeline ranks", ranks.rate, "1/s",
                  f"batch of one row: {slow.rate:.2f}, target 3x", [ranks.rate / slow.rate]),
        bench_row("p99 over median on 4 ranks", max(ranks.tails), "", "at most 2",
                  [2 / tail for tail in ranks.tails]),
        bench_row("wrong on 4 ranks", ranks.wrong + slow.wrong, "", "0",
                  [float(not ranks.wrong + slow.wrong)]),
    ]  # fmt: skip


def _expected(models: ModelPaths, folder: Path) -> dict[tuple[str, int, int], bytes]:
    """The pictures of `tapir sample` by caption, seed and candidate."""
    pictures = {}
    for seed in SEEDS:
        out = folder / f"sampled-{seed}"
        command = module_command(
            *("tapir", "sample", *CAPTIONS, f"--seed={seed}", f"--candidates={max(COUNTS)}"),
            *(f"--{name}={getattr(models, name)}" for name in ("prior", "dvae", "clip", "bpe")),
            *("--no-rerank", f"--out={out / 'grid.png'}", f"--pictures={out / 'each'}"),
        )
        subprocess.run(command, check=True, env=child_environment(), cwd=ROOT, capture_output=True)
        for i, caption in enumerate(CAPTIONS):
            for j in range(max(COUNTS)):
                path = out / "each" / f"caption-{i:03d}-candidate-{j:03d}.png"
                pictures[caption, seed, j] = path.read_bytes()
    return pictures


def _load(address: str, expected: dict[tuple[str, int, int], bytes], requests: int) -> Load:
    """Each client sends its next request when its last one is answered."""
    asked = [
        Asked(
            caption=CAPTIONS[i % len(CAPTIONS)],
            seed=SEEDS[i // len(CAPTIONS) % len(SEEDS)],
            count=COUNTS[i % len(COUNTS)],
        )
        for i in range(requests)
    ]
    latencies: defaultdict[int, list[float]] = defaultdict(list)
    wrong = 0
    began = time.monotonic()
    with (
        httpx.Client(
            base_url=address,
            timeout=_LONGEST,
            trust_env=False,
            limits=httpx.Limits(max_connections=CLIENTS),
        ) as client,
        ThreadPoolExecutor(CLIENTS) as clients,
    ):
        for each, (seconds, failures) in zip(
            asked, clients.map(lambda x: _ask(client, x, expected), asked), strict=True
        ):
            latencies[each.count].append(seconds)
            wrong += failures
    return Load(
        pictures=sum(each.count for each in asked),
        seconds=time.monotonic() - began,
        latencies=dict(latencies),
        wrong=wrong,
    )


def _ask(
    client: httpx.Client, asked: Asked, expected: dict[tuple[str, int, int], bytes]
) -> tuple[float, int]:
    """Seconds of a request, and how many of its pictures are wrong."""
    body = {
        "prompt": asked.caption,
        "n": asked.count,
        "seed": asked.seed,
        "response_format": "b64_json",
    }
    began = time.monotonic()
    answer = client.post("/v1/images/generations", json=body)
    seconds = time.monotonic() - began
    if answer.status_code != 200:
        return seconds, asked.count
    drawn = {x["candidate"]: base64.b64decode(x["b64_json"]) for x in answer.json()["data"]}
    own = range(asked.count)
    return seconds, sum(drawn.get(i) != expected[asked.caption, asked.seed, i] for i in own)


def _memory(process: "subprocess.Popen[bytes]") -> int:
    """Bytes of the server's processes, shared pages counted once."""
    server = psutil.Process(process.pid)
    everyone = [server, *server.children(recursive=True)]
    return sum(each.memory_full_info().pss for each in everyone)


@contextlib.contextmanager
def _served(models: Path, *flags: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server of the models in a folder, ready; its address and process."""
    log = models / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            module_command("tapir", "serve", f"x={models}", "--port=0", *flags),
            env=child_environment(),
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield _ready(process, log), process
        process.send_signal(signal.SIGTERM)
        process.wait(_LONGEST)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    until = time.monotonic() + _LONGEST
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
        told = _ADDRESS.search(log.read_text())
        if told and httpx.get(f"{told[1]}/healthz", trust_env=False).status_code == 200:
            return told[1]
    raise TapirError(f"the server did not start: {log.read_text()[-2000:]}")
