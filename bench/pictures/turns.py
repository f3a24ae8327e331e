"""How long a step of given length waits for its pictures, and what making them costs the step.

JPEGs of 512x384 pixels become the 256x256 crops of the paper's dVAE, A_SECOND a second. A step
calls small torch kernels one by one on its own thread, as the launches of a GPU's step do, then
sleeps until it has its given length. Contenders take turns in one process, each for some steps and
for as many batches without a step:

none        the step alone, without pictures: how long its calls take undisturbed
serial      the step's thread makes each batch, then the step begins
threads     data_pipeline.streaming.ahead, as a training run uses it
processes   the same, but each job asks a process (spawned, without torch) for the uint8 crops
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import psutil
import torch

from bench.support.picture_child import crops, jpeg, ready
from bench.support.rows import bench_row
from bench.support.sizes import sized
from data_pipeline.config import LoaderConfig
from data_pipeline.streaming.ahead import depth_of, prepared_ahead
from data_pipeline.tokenize.encode import to_tensor
from training.presets import dvae_paper
from training.tasks.task import hand_over

PIXELS = dvae_paper().model.pixels
A_SECOND = 64
"""Pictures of a rank's steps: the paper's dVAE on 8 H100s, by `tapir plan paper_dvae --world 8`."""
PICTURES = sized(64, 4)
TURN_SECONDS, LEAST_STEPS = sized(2.0, 0.15), 3
"""Of a turn's steps."""
ROUNDS = sized(9, 1)
CALLS = 0.1
"""Part of the step in which its thread calls kernels; the dVAE's 3,800 take under 0.05."""
WORKERS = LoaderConfig().workers
AIM = 0.01
CPU = torch.device("cpu")
Batches = Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The figures of a contender's turn, in seconds."""

    length: float
    """Of a step without its wait."""
    waits: list[float]
    own: list[float]
    """CPU of the step's thread in each wait."""
    calls: float
    """Mean time of a step's own calls."""
    total: float
    """Of all steps, waits included."""
    flat_out: float
    """A batch, without steps."""
    cpu: float
    """CPU of it, in this process and its children."""

    @property
    def median(self) -> float:
        """Part of the time that the step of median wait waits."""
        each = statistics.median(self.waits)
        return each / (each + self.length)

    @property
    def share(self) -> float:
        """Part of the time that the step's thread waits."""
        return sum(self.waits) / self.total


class Pictures:
    """Makes the batch of a step."""

    def __init__(self, encoded: list[bytes], batch: int) -> None:
        self.encoded, self.batch = encoded, batch

    def here(self, step: int) -> torch.Tensor:
        """By this thread."""
        return to_tensor(crops(self._of(step), PIXELS, step))

    def there(self, pool: ProcessPoolExecutor, step: int) -> torch.Tensor:
        """By a process, but for the conversion to floats."""
        return to_tensor(pool.submit(crops, self._of(step), PIXELS, step).result())

    def _of(self, step: int) -> list[bytes]:
        return [self.encoded[(step * self.batch + i) % PICTURES] for i in range(self.batch)]


def run(step_ms: float = 50.0) -> list[dict[str, Any]]:
    """Rows; each ratio is from turns of the same round."""
    torch.set_num_threads(1)
    feed = Pictures(
        [jpeg(seed) for seed in range(PICTURES)], max(1, round(A_SECOND * step_ms / 1000))
    )
    length, calls = step_ms / 1000, _calls_in(CALLS * step_ms / 1000)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, spawn) as pool:
        for started in [pool.submit(ready) for _ in range(WORKERS)]:
            started.result()
        makers: dict[str, Batches] = {
            "none": lambda: iter(lambda: torch.empty(0, device="cpu"), None),
            "serial": lambda: map(feed.here, count()),
            "threads": lambda: _ahead(feed.here),
            "processes": lambda: _ahead(partial(feed.there, pool)),
        }
        turns: dict[str, list[Turn]] = {name: [] for name in makers}
        for number in range(-1, ROUNDS):  # the first round is not counted
            for name, make in makers.items():
                turn = _turn(make, length, calls)
                print(f"{name}: wait {turn.share:.4f}, calls {turn.calls:.4f}", file=sys.stderr)
                if number >= 0:
                    turns[name].append(turn)
    return [*_waits(turns, step_ms), *_costs(turns, feed.batch), *_constants(turns, feed)]


def _ahead(make: Callable[[int], torch.Tensor]) -> Iterator[torch.Tensor]:
    made = prepared_ahead(
        count(), lambda step: [partial(make, step)], WORKERS, depth_of(WORKERS, 1)
    )
    with closing(made):
        for _, (batch,) in made:
            yield batch


def _turn(make: Batches, length: float, calls: int) -> Turn:
    waits, own, inside = [], [], []
    steps = max(LEAST_STEPS, round(TURN_SECONDS / length))
    batches = make()
    next(batches)  # a run's first batch is not ready yet
    time.sleep(length)
    began = time.perf_counter()
    for _ in range(steps):
        used, asked = time.thread_time(), time.perf_counter()
        hand_over({"pixels": next(batches)}, CPU)
        begun = time.perf_counter()
        own.append(time.thread_time() - used)
        _call(calls)
        called = time.perf_counter()
        time.sleep(max(0.0, begun + length - called))
        waits.append(begun - asked)
        inside.append(called - begun)
    total = time.perf_counter() - began
    for _ in range(depth_of(WORKERS, 1)):
        next(batches)  # what was made during the steps
    used, began = _cpu(), time.perf_counter()
    for _ in range(steps):
        next(batches)
    flat_out = (time.perf_counter() - began) / steps
    cpu = (_cpu() - used) / steps
    if hasattr(batches, "close"):
        batches.close()
    return Turn(
        length=length,
        waits=waits,
        own=own,
        calls=statistics.fmean(inside),
        total=total,
        flat_out=flat_out,
        cpu=cpu,
    )


def _cpu() -> float:
    """CPU seconds of this process and of the pool's."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return float(time.process_time() + sum(row.user + row.system for row in times))


def _call(times: int) -> None:
    x = torch.ones(8, device="cpu")
    for _ in range(times):
        x = torch.add(x, 1.0)


def _calls_in(seconds: float) -> int:
    """Calls that take about this long."""
    tried = 2000
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        _call(tried)
        spent.append(time.perf_counter() - began)
    return max(1, round(tried * seconds / min(spent)))


def _waits(turns: dict[str, list[Turn]], step_ms: float) -> list[dict[str, Any]]:
    """Shares of the time that is waited; `none` is what the machine's other work adds."""
    rows = []
    for name in ("threads", "processes", "serial", "none"):
        of_all = [turn.share for turn in turns[name]]
        of_median = [turn.median for turn in turns[name]]
        for what, shares in ((f"{step_ms:g} ms steps", of_all), ("a median step", of_median)):
            ratios = [AIM / max(share, 1e-6) for share in shares]
            title = f"{name}: share of {what} waited"
            rows.append(bench_row(title, statistics.median(shares), "", f"at most {AIM}", ratios))
    return rows


def _costs(turns: dict[str, list[Turn]], batch: int) -> list[dict[str, Any]]:
    """What making pictures beside it costs a step's own calls, and the pictures a second."""
    rows = []
    for name in ("threads", "processes"):
        pairs = list(zip(turns["none"], turns[name], strict=True))
        slower = [alone.calls / beside.calls for alone, beside in pairs]
        calls = statistics.median(turn.calls for turn in turns[name])
        title = f"{name}: a step's calls beside them"
        rows.append(bench_row(title, 1000 * calls, "ms", "the step alone", slower))
    for name, base in (("threads", "serial"), ("threads", "processes")):
        pairs = list(zip(turns[base], turns[name], strict=True))
        ratios = [theirs.flat_out / mine.flat_out for theirs, mine in pairs]
        rate = batch / statistics.median(turn.flat_out for turn in turns[name])
        rows.append(bench_row(f"{name}, without a step", rate, "pictures/s", base, ratios))
        less = [theirs.cpu / max(mine.cpu, 1e-6) for theirs, mine in pairs]
        used = 1000 * statistics.median(turn.cpu for turn in turns[name]) / batch
        rows.append(bench_row(f"{name}, without a step, CPU", used, "ms/picture", base, less))
    return rows


def _constants(turns: dict[str, list[Turn]], feed: Pictures) -> list[dict[str, Any]]:
    """The constants of planning/decode.py."""
    spent = []
    for number in range(ROUNDS):
        began = time.thread_time()
        for step in range(10):
            feed.here(step + number)
        spent.append((time.thread_time() - began) / 10 / feed.batch)
    once = statistics.median(spent)
    medians = [statistics.median(turn.own) for turn in turns["threads"]]
    hand = statistics.median(medians)
    return [
        bench_row("CPU a picture", 1000 * once, "ms", "its median", [once / x for x in spent]),
        bench_row(
            "hand-over of a ready batch, CPU of the step's thread",
            1000 * hand,
            "ms",
            "its median",
            [hand / x for x in medians],
        ),
    ]
