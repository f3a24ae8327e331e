"""Machines in miniature: network namespaces joined by a veth pair whose rate tbf shapes."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from bench.support.children import child_environment, module_command

LEAST_BURST = 65_536
"""Bytes; tbf needs at least a timer tick's worth at the rate."""


@dataclass
class Machines:
    """Two namespaces with a link between them; needs root and iproute2."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    devices: tuple[str, str]
    running: list["subprocess.Popen[str]"] = field(default_factory=list)

    def shape(self, megabits: float | None) -> None:
        """Limit the link's rate in both directions; None lifts the limit."""
        for name, device in zip(self.names, self.devices, strict=True):
            _run("ip", "netns", "exec", name, "tc", "qdisc", "del", "dev", device, "root", ok=False)
            if megabits is not None:
                burst = max(LEAST_BURST, int(megabits * 1e6 / 8 / 100))
                rate = ["rate", f"{megabits:g}mbit", "burst", str(burst), "latency", "400ms"]
                tbf = ["tc", "qdisc", "add", "dev", device, "root", "tbf", *rate]
                _run("ip", "netns", "exec", name, *tbf)

    def run(self, command: Sequence[str], ranks: int, port: int) -> list[str]:
        """Run a module with arguments as `ranks` ranks on each machine; returns each rank's output.

        Raises: CalledProcessError if a rank fails, after all have ended.
        """
        world = 2 * ranks
        for rank in range(world):
            machine = rank // ranks
            environment = {
                **child_environment(),
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank % ranks),
                "MASTER_ADDR": self.addresses[0],
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": self.devices[machine],
                "OMP_NUM_THREADS": "1",
            }
            self.running.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", self.names[machine], *module_command(*command)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate()[0] for process in self.running]
            for process, output in zip(self.running, outputs, strict=True):
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, command, output)
            return outputs
        finally:
            self.end()

    def end(self) -> None:
        """Kill all remaining processes."""
        for process in self.running:
            process.kill()
            process.wait()
        self.running.clear()


@contextmanager
def two_machines() -> Iterator[Machines]:
    """Make the namespaces and the link, and remove them afterwards."""
    tag = f"tp{os.getpid() % 100_000}"
    names, devices = (f"{tag}a", f"{tag}b"), (f"{tag}v0", f"{tag}v1")
    machines = Machines(names, ("10.231.7.1", "10.231.7.2"), devices)
    with ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name, ok=False)
        _run("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for name, device, address in zip(names, devices, machines.addresses, strict=True):
            _run("ip", "link", "set", device, "netns", name)
            inside = ["ip", "netns", "exec", name, "ip"]
            _run(*inside, "address", "add", f"{address}/24", "dev", device)
            _run(*inside, "link", "set", device, "up")
            _run(*inside, "link", "set", "lo", "up")
        stack.callback(machines.end)
        yield machines


def _run(*command: str, ok: bool = True) -> None:
    subprocess.run(command, check=ok, capture_output=True)
