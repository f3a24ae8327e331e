"""A running `tapir serve`, and what tests ask of it."""

import contextlib
import io
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from generation.config import ModelPaths
from tests.harness import PATIENCE, TAPIR, tapir
from tests.hostile import bare, foreign_code, hostile_folder
from tests.unit.finished import write_models

CAPTIONS = ["a small red circle", "two blue squares"]
TOKEN = "a token of enough characters"
_ADDRESS = re.compile(r"page: (http://\S+)/")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server of tiny models."""

    address: str
    models: ModelPaths
    process: Any
    log: Path
    temporary: Path
    """Its temporary folder."""

    def client(self, **more: Any) -> httpx.Client:
        """An HTTP client that ignores proxies."""
        return httpx.Client(base_url=self.address, timeout=PATIENCE, trust_env=False, **more)

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        with self.client(headers={"authorization": f"Bearer {TOKEN}"}) as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(x.split()[-1]) for x in lines if re.match(rf"{name}[ {{]", x))

    def until_metric(self, name: str, value: float) -> None:
        """Wait for a metric's value."""
        until = time.monotonic() + PATIENCE
        while self.metric(name) != value:
            assert time.monotonic() < until, (name, value, self.metric(name))
            select.select([], [], [], 0.1)

    def until_ready(self) -> None:
        """Wait until all models are ready."""
        until = time.monotonic() + PATIENCE
        with self.client() as client:
            while client.get("/healthz").status_code != 200:
                assert self.process.poll() is None and time.monotonic() < until, self.told()
                select.select([], [], [], 0.1)

    def peak_memory(self) -> int:
        """The most bytes that the server's own process has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024

    def traceback(self) -> bool:
        """True if an exception got through to the log."""
        return "Traceback" in self.log.read_text()

    def told(self) -> str:
        return self.log.read_text()[-4000:]

    def sampled(
        self, folder: Path, caption: str, count: int, *flags: str, models: ModelPaths | None = None
    ) -> list[bytes]:
        """The PNGs that `tapir sample` draws with the same models."""
        used = models or self.models
        paths = (f"--{name}={getattr(used, name)}" for name in ("prior", "dvae", "bpe"))
        tapir(
            *("sample", caption, f"--out={folder / 'grid.png'}", f"--pictures={folder / 'each'}"),
            *(f"--candidates={count}", f"--clip={used.clip}", *paths, *flags),
        )
        return [path.read_bytes() for path in sorted((folder / "each").iterdir())]


@contextmanager
def served(folder: Path, *flags: str, more: tuple[str, ...] = ()) -> Iterator[Served]:
    """Start a server of tiny models named `tiny` in a hostile folder, and end it by SIGTERM.

    `more`: further models, NAME=FOLDER.
    """
    models = write_models(folder / "models", CAPTIONS, dropout=0.1)
    log, temporary = folder / "log", folder / "tmp"
    temporary.mkdir()
    hostile = hostile_folder(folder / "hostile")
    (folder / "token").write_text(TOKEN)
    command = [*TAPIR, "serve", f"tiny={folder / 'models'}", *more, "--port=0", *flags]
    with open(log, "ab") as output:  # start_tapir's processes end with each test
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**bare(), "TMPDIR": str(temporary)},
            cwd=hostile,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + PATIENCE
        while not (told := _ADDRESS.search(log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            select.select([], [], [], 0.1)
        server = Served(
            address=told[1], models=models, process=process, log=log, temporary=temporary
        )
        server.until_ready()
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, server.told()
        assert foreign_code(hostile) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def png(pixels: Any, mode: str | None = None) -> bytes:
    """Encode an array as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(buffer, "PNG")
    return buffer.getvalue()


def tree(folder: Path) -> set[Path]:
    """All paths below a folder."""
    return set(folder.rglob("*"))


def mask_png(side: int, rows: slice, columns: slice) -> bytes:
    """A mask that is transparent in a rectangle of pixels."""
    mask = np.full((side, side, 4), 255, np.uint8)
    mask[rows, columns, 3] = 0
    return png(mask)
