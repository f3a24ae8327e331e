"""Play a step through: what each stream of a GPU does when, and what waits for what.

A stream runs its tasks in the order in which they were issued, each when the tasks it waits for
have ended. While a link's stream is busy, its collectives take multiprocessors and memory
bandwidth from the computation, which slows down by `slowed`.
"""

from collections import defaultdict
from dataclasses import dataclass, field

COMPUTE = "compute"


@dataclass(frozen=True)
class Task:
    """Work of one stream."""

    stream: str
    seconds: float
    """If nothing else runs."""
    after: tuple[int, ...] = ()
    """Numbers of the tasks that it waits for, as `Tasks.add` gives them."""


@dataclass
class Tasks:
    """Tasks in the order in which they are issued."""

    rows: list[Task] = field(default_factory=list)

    def add(self, stream: str, seconds: float, *after: int) -> int:
        """Issue a task; the number to wait for it by. -1 in `after` is nothing."""
        self.rows.append(Task(stream, seconds, tuple(number for number in after if number >= 0)))
        return len(self.rows) - 1


@dataclass(frozen=True)
class Played:
    """When everything ended."""

    seconds: float
    computed: float
    """Seconds of computation, if nothing else had run."""
    slowed: float
    """Seconds by which collectives slowed the computation that ran beside them."""
    waited: float
    """Seconds in which the computation waited: what is exposed."""
    busy: dict[str, float]
    """Seconds of each link's stream."""
    ends: list[float]
    """End of each task."""

    def more(self, fewer: "Played", times: int) -> "Played":
        """The same with what this adds to `fewer` another `times`."""

        def longer(name: str) -> float:
            mine, less = getattr(self, name), getattr(fewer, name)
            return float(mine + times * (mine - less))

        names = ("seconds", "computed", "slowed", "waited")
        busy = {k: v + times * (v - fewer.busy.get(k, 0.0)) for k, v in self.busy.items()}
        return Played(**{name: longer(name) for name in names}, busy=busy, ends=self.ends)


def play(tasks: Tasks, slowed: float) -> Played:
    """Play the tasks; computation beside a collective keeps 1 - `slowed` of its rate."""
    rows = tasks.rows
    queues: dict[str, list[int]] = defaultdict(list)
    for number, task in enumerate(rows):
        queues[task.stream].append(number)
    at = dict.fromkeys(queues, 0)
    left = [task.seconds for task in rows]
    ends, done = [0.0] * len(rows), [False] * len(rows)
    clock = lost = computing = 0.0
    while True:
        active = _ready(queues, at, rows, done)
        if not active:
            break
        links = any(stream != COMPUTE for stream in active)
        rate = 1 - slowed if links else 1.0
        rates = {stream: rate if stream == COMPUTE else 1.0 for stream in active}
        step = min(left[number] / rates[stream] for stream, number in active.items())
        clock += step
        if COMPUTE in active:
            computing += step
            lost += step * (1 - rate)
        for stream, number in active.items():
            left[number] -= step * rates[stream]
            if left[number] <= 1e-15:
                done[number], ends[number] = True, clock
                at[stream] += 1
    busy = {
        stream: sum(rows[number].seconds for number in numbers)
        for stream, numbers in queues.items()
        if stream != COMPUTE
    }
    return Played(clock, computing - lost, lost, clock - computing, busy, ends)


def _ready(
    queues: dict[str, list[int]], at: dict[str, int], rows: list[Task], done: list[bool]
) -> dict[str, int]:
    """Stream -> number of its next task, for the streams whose next task waits for nothing."""
    active = {}
    for stream, numbers in queues.items():
        if at[stream] < len(numbers):
            number = numbers[at[stream]]
            if all(done[before] for before in rows[number].after):
                active[stream] = number
    return active
