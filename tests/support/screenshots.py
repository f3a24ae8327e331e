"""The pictures of pages in docs/images, taken again by a real Chromium.

    python -m tests.support.screenshots study
    python -m tests.support.screenshots report runs/panels      # any finished run

The study compares drawn shapes with the same ones blurred.
"""

import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from playwright.sync_api import Page

from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import decode_rgb
from data_pipeline.sources.units import shapes_pairs
from tests.harness import ROOT, end_started, json_of, tapir
from tests.support.browser import chromium
from tests.support.raters import Server
from workflow.report.page import write_report

IMAGES = ROOT / "docs" / "images"
MOST_BYTES = 150_000
_PAIRS, _PIXELS, _SIGMA = 12, 128, 6.0
_SIZES = {"study": (900, 865), "report": (1000, 1150)}


def study_page(page: Page, folder: Path) -> None:
    """Open the first page of a rater."""
    for name in ("sharp", "blurred"):
        (folder / name).mkdir()
    for i, pair in enumerate(shapes_pairs(0, _PAIRS, _PIXELS, 0)):
        sharp = decode_rgb(pair.image, pair.where)
        blurred = np.asarray(cv2.GaussianBlur(sharp, (0, 0), _SIGMA), np.uint8)
        for name, picture in (("sharp", sharp), ("blurred", blurred)):
            (folder / name / f"{i}.png").write_bytes(encode_png(picture))
            (folder / name / f"{i}.txt").write_bytes(pair.caption)
    study = folder / "study"
    sets = [str(folder / name) for name in ("sharp", "blurred")]
    tapir("study", "make", *sets, f"--out={study}", "--catch-every=0")
    link = json_of("study", "links", str(study), "--raters=1")["1"]
    server = Server(study, folder / "log")
    server.start()
    page.goto(f"http://127.0.0.1:{server.port}/r/{link.rpartition('/r/')[2]}")


def main(name: str, run: str = "") -> Path:
    """Write docs/images/NAME.png; `run` is the folder of the report."""
    target, (width, height) = IMAGES / f"{name}.png", _SIZES[name]
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        page = browser.new_page(viewport={"width": width, "height": height})
        if name == "study":
            study_page(page, Path(folder))
        else:
            page.goto(write_report(Path(run)).absolute().as_uri())
        page.wait_for_load_state("networkidle")
        data = page.screenshot()
        end_started()
    if len(data) >= MOST_BYTES:
        raise SystemExit(f"{target}: {len(data)} bytes, {MOST_BYTES} are too many; nothing written")
    target.write_bytes(data)
    return target


if __name__ == "__main__":
    if sys.argv[1:2] not in (["study"], ["report"]) or len(sys.argv) > 3:
        raise SystemExit(__doc__)
    sys.stdout.write(f"{main(*sys.argv[1:])}\n")
