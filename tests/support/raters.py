"""Studies of small pictures, their servers, and raters who speak HTTP and look at pixels."""

import http.client
import io
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.images.crops import encode_png
from tests.harness import PATIENCE, start_tapir

RED, BLUE = (220, 30, 30), (30, 30, 220)
ADDRESS = re.compile(r"study: http://([\w.]+):(\d+)")
Rgb = NDArray[np.uint8]


def captions_of(count: int) -> list[str]:
    """Distinct captions, as `clean_caption` leaves them."""
    return [f"a picture with the number {i}" for i in range(count)]


def write_set(folder: Path, captions: Sequence[str], colour: tuple[int, int, int]) -> Path:
    """A folder of pictures with captions: the left half has the colour, the right half is white."""
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        pixels = np.full((12, 12, 3), 255, np.uint8)
        pixels[:, :6] = colour
        pixels[i % 12, i // 12] = 0  # different from caption to caption
        (folder / f"{i:03d}.png").write_bytes(encode_png(pixels))
        (folder / f"{i:03d}.txt").write_text(caption)
    return folder


class Server:
    """`tapir study serve`, to be killed and started again."""

    def __init__(self, study: Path, log: Path) -> None:
        self._study, self._log = study, log
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start on a free port, later on the same one; returns when it listens."""
        begun = len(self._text())
        flags = [f"--port={self.port}"]
        self._process = start_tapir("study", "serve", str(self._study), *flags, log=self._log)
        until = time.monotonic() + PATIENCE
        while not (match := ADDRESS.search(self._text()[begun:])):
            assert self._process.poll() is None, self._text()
            assert time.monotonic() < until, self._text()
            time.sleep(0.02)
        self.port = int(match[2])

    def kill(self) -> None:
        """SIGKILL, as of a machine that is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(PATIENCE)

    def _text(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


class Rater:
    """A rater's browser without a screen: reads the page, looks at both pictures, answers."""

    def __init__(self, server: Server, link: str) -> None:
        self._server = server
        self.path = "/r/" + link.rpartition("/r/")[2]

    def request(
        self, method: str, path: str, body: str | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """One request, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=PATIENCE)
        form = {"Content-Type": "application/x-www-form-urlencoded"} if body is not None else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, {**form, **named})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def trial(self) -> int | None:
        """The number of the trial that the page shows; None at the end."""
        status, page = self.request("GET", self.path)
        assert status == 200, page
        shown = re.search(rf'action="{self.path}/(\d+)"', page.decode())
        return int(shown[1]) if shown else None

    def look(self, trial: int) -> tuple[Rgb, Rgb]:
        """The pictures on the left and on the right."""
        pictures = []
        for seat in ("left", "right"):
            status, data = self.request("GET", f"{self.path}/{trial}/{seat}.png")
            assert status == 200, data
            pictures.append(np.asarray(Image.open(io.BytesIO(data))))
        return pictures[0], pictures[1]

    def answer(self, trial: int, realism: str, match: str) -> int:
        """Send an answer; returns the status: 303 counted, 409 counted before or closed."""
        body = urlencode({"realism": realism, "match": match})
        return self.request("POST", f"{self.path}/{trial}", body)[0]


def is_catch(left: Rgb, right: Rgb) -> bool:
    """True if both pictures have the same pixels, in another order."""
    rows = [sorted(map(tuple, picture.reshape(-1, 3).tolist())) for picture in (left, right)]
    return rows[0] == rows[1]


def intact(left: Rgb, right: Rgb) -> str:
    """Of a catch trial: the seat of the picture whose right half is white."""
    return max(("left", left), ("right", right), key=lambda each: int(each[1][:, 6:].sum()))[0]


def seat_of(colour: tuple[int, int, int], left: Rgb) -> str:
    """The seat of the picture in this colour."""
    return "left" if (left == np.asarray(colour, np.uint8)).all(-1).any() else "right"


def json_line(text: str) -> Any:
    """The JSON object of the last line of a command's output that is one."""
    import json

    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
