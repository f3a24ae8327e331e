"""Captioned pictures from an npm package: emoji and their names."""

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files.atomic import write_atomic
from data_pipeline.sources.pair import Pair

GOOGLE, _VERSION = "google", "16.0.0"
PIXELS = 64
"""Side of its pictures."""
_MEMBERS = re.compile(rf"package/(emoji\.json|img/[a-z]+/{PIXELS}/[0-9a-z-]+\.png)")


def emoji_pairs(cache: Path, vendor: str = GOOGLE) -> Iterator[Pair]:
    """Yield each emoji of a vendor's set with its name; skin tones are part of the caption.

    Only Google's set may be passed on (Apache 2.0); others are for experiments on this machine.
    Raises: InputError if npm is missing or cannot fetch the package.
    """
    archive = _fetch(cache, vendor)
    with tarfile.open(archive) as tar:
        files = {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and _MEMBERS.fullmatch(member.name)
        }
    entries = json.loads(files["package/emoji.json"])
    tones = {entry["unified"]: entry["name"].lower() for entry in entries}
    for entry in sorted(entries, key=lambda entry: entry["unified"]):
        name = entry["name"] or entry["short_name"].replace("_", " ")
        yield from _pair(files, vendor, entry, name.lower(), name.lower())
        for tone, variant in sorted(entry.get("skin_variations", {}).items()):
            words = " and ".join(_tone(tones[part]) for part in tone.split("-"))
            yield from _pair(files, vendor, variant, f"{name.lower()}, {words}", name.lower())


def _tone(name: str) -> str:
    """`emoji modifier fitzpatrick type-3` -> `medium-light skin tone`."""
    words = {"1-2": "light", "3": "medium-light", "4": "medium", "5": "medium-dark", "6": "dark"}
    return f"{words[name.rsplit('type-', 1)[1]]} skin tone"


def _pair(
    files: dict[str, bytes], vendor: str, entry: Any, caption: str, base: str
) -> Iterator[Pair]:
    image = files.get(f"package/img/{vendor}/{PIXELS}/{entry['image']}")
    if image is not None and entry.get(f"has_img_{vendor}", True):
        yield Pair(
            key=entry["unified"].lower(),
            image=image,
            extension="png",
            caption=caption.encode(),
            split_key=base,
            where=f"{_package(vendor)}/{entry['image']}",
        )


def _package(vendor: str) -> str:
    return f"emoji-datasource-{vendor}@{_VERSION}"


def _fetch(cache: Path, vendor: str) -> Path:
    package = _package(vendor)
    target = cache / (package.replace("@", "-") + ".tgz")
    if target.exists():
        return target
    if shutil.which("npm") is None:
        raise InputError("the emoji pictures come through npm; install it with: apt install npm")
    with tempfile.TemporaryDirectory() as staging:
        done = subprocess.run(
            ["npm", "pack", package, "--silent"], cwd=staging, capture_output=True, text=True
        )
        packed = list(Path(staging).glob("*.tgz"))
        if done.returncode or not packed:
            raise InputError(f"npm could not fetch {package}: {done.stderr.strip()[-500:]}")
        write_atomic(target, packed[0].read_bytes())
    return target
