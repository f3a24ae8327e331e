"""Wheels for a GPU machine without a network: downloaded beforehand, installed there.

`lay` needs an index and any Python 3; `install` needs pip alone. Only the standard library is
imported: this runs before anything is installed.
"""

import argparse
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".whl"
LIST = Path(__file__).with_name("wheels.txt")
MOST = 60 * 2**20
"""Bytes of the tree and the wheels together that may travel."""
PYTHON = "3.12"
_UNFINISHED, _NAMED = "unfinished-", 5
BUILT = {"deepspeed": {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}}
"""What the index has no wheel of, and the environment that builds one for every machine."""
GLIBC = ("_2_28", "_2_27", "_2_24", "_2_17", "_2_12", "_2_5", "2014", "1")
"""Platform tags that a machine of today accepts; pip matches each exactly."""


class WheelsError(Exception):
    """The wheels could not be laid or installed; the text says what to do."""


def plain(name: str) -> str:
    """A project's name as in its wheel's file name."""
    return re.sub(r"[-_.]+", "_", name).lower()


def pins(*files: Path) -> dict[str, str]:
    """Versions by plain name of the lines `name==version`."""
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if "==" in line]
    return {plain(name): version for name, version in pairs}


def names(file: Path) -> list[str]:
    """Plain names of a list of requirements."""
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    return [plain(re.split("[<>=;]", line)[0].strip()) for line in lines if line]


def pinned_versions() -> dict[str, str]:
    """Names and versions of the wheels to install."""
    versions = pins(ROOT / "constraints" / "gpu.txt", LIST)
    return {name: versions[name] for name in names(LIST)}


def laid(folder: Path, wheels: Mapping[str, str]) -> dict[str, Path]:
    """The needed wheels in a folder; all others are removed."""
    prefixes = {f"{name}-{version}-": name for name, version in wheels.items()}
    there = {}
    for path in sorted(folder.glob("*.whl")):
        project, version = path.name.split("-")[:2]
        name = prefixes.get(f"{plain(project)}-{version}-")
        if name is None or name in there or not fits(path.name):
            path.unlink()  # two versions of a project stop the whole install
        else:
            there[name] = path
    return there


def lay(folder: Path, wheels: Mapping[str, str]) -> int:
    """Fetch or build the wheels that are missing; returns how many.

    Raises: WheelsError if pip cannot fetch one; fetched ones are kept.
    """
    folder.mkdir(exist_ok=True)
    _sweep(folder)
    there = laid(folder, wheels)
    missing = {name: version for name, version in wheels.items() if name not in there}
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{_UNFINISHED}{os.getpid()}-") as name:
        for project in missing.keys() & BUILT.keys():
            what = ["wheel", "--no-cache-dir", f"--wheel-dir={name}"]
            _pip([*what, "--no-deps", f"{project}=={missing[project]}"], BUILT[project])
        fetched = [f"{name}=={missing[name]}" for name in missing if name not in BUILT]
        if fetched:
            tags = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
            tags += [f"--platform=manylinux{glibc}_x86_64" for glibc in GLIBC]
            _pip(["download", f"--dest={name}", "--no-deps", *tags, *fetched])
        for path in Path(name).glob("*.whl"):
            path.rename(folder / path.name)
    return len(missing)


def _sweep(folder: Path) -> None:
    """Delete leftovers of killed runs."""
    for left in folder.glob(f"{_UNFINISHED}*-*"):
        if not Path("/proc", left.name.removeprefix(_UNFINISHED).split("-")[0]).exists():
            shutil.rmtree(left, ignore_errors=True)


def fits(wheel: str) -> bool:
    """Say whether a wheel is one of the GPU machine's Python or of any."""
    python, abi, _ = wheel.removesuffix(".whl").split("-")[-3:]
    return bool({"py3", f"cp{PYTHON.replace('.', '')}"} & set(python.split("."))) or abi == "abi3"


def weigh(folder: Path, root: Path = ROOT) -> str:
    """Size of the files that git does not ignore and of the wheels, as text.

    Raises: WheelsError if it is more than may travel.
    """
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout
    listed_files = (root / name for name in output.split("\0") if name)
    files = [path for path in listed_files if path.is_file()]
    tree = [path.stat().st_size for path in files]
    wheels = [path.stat().st_size for path in folder.glob("*.whl")]
    total = sum(tree) + sum(wheels)
    words = (
        f"{len(wheels)} wheels {sum(wheels) / 2**20:.1f} MiB + {len(tree)} files of the tree "
        f"{sum(tree) / 2**20:.1f} MiB = {total / 2**20:.1f} MiB of {MOST / 2**20:.0f}"
    )
    if total > MOST:
        sizes = {path: path.stat().st_size for path in [*files, *folder.glob("*.whl")]}
        largest = sorted(sizes, key=lambda path: -sizes[path])[:_NAMED]
        rows = (f"  {sizes[path] / 2**20:6.1f} MiB {path.relative_to(root)}" for path in largest)
        raise WheelsError(
            f"too much to travel: {words}; move away or ignore (.gitignore) what is not needed, "
            "the largest are\n" + "\n".join(rows)
        )
    return words


def install(folder: Path, site: Path) -> int:
    """Unpack the wheels into a folder for PYTHONPATH, without an index; returns how many.

    The Python that runs this stays as it is. Nothing is done if the same wheels are there.
    Raises: WheelsError if there are no wheels, or pip refuses one.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise WheelsError(f"no wheels in {folder}: run `make wheels` where there is an index")
    stamp, text = site / "wheels.installed", "\n".join([sys.version, *(w.name for w in wheels)])
    if stamp.is_file() and stamp.read_text() == text:
        return 0
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as name:
        fresh = Path(name, "site")
        offline = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        _pip(["install", *offline, f"--target={fresh}", *map(str, wheels)])
        (fresh / stamp.name).write_text(text)
        shutil.rmtree(site, ignore_errors=True)
        fresh.rename(site)
    return len(wheels)


def _pip(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run this Python's pip.

    Raises: WheelsError with what pip says.
    """
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-P", "-m", "pip", *arguments, *quiet]
    variables = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore", **(environment or {})}
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, preexec_fn=_die_with_parent
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "WARNING" not in line]
        raise WheelsError(
            "\n".join(lines[-5:])
            + f"\npip {arguments[0]} failed: `lay` needs a package index that pip reaches (see "
            "`pip config list`), `install` wheels of this Python's version"
        )


def _die_with_parent() -> None:
    """Ask the kernel (Linux) to kill pip when this process is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> int:
    """Lay or install; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="the folder of the wheels")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("lay", help="fetch what is missing, then weigh it with the tree")
    site = verbs.add_parser("install", help="unpack them into a folder for PYTHONPATH")
    site.add_argument("site", type=Path)
    flags = parser.parse_args()
    try:
        if flags.verb == "lay":
            new = lay(flags.wheels, pinned_versions())
            print(f"{new} fetched; {weigh(flags.wheels)}")
        else:
            new = install(flags.wheels, flags.site.absolute())
            path = f"{ROOT}:{flags.site.absolute()}"  # first: a wheel contains `tests` too
            print(f"{new} wheels installed; export PYTHONPATH={path}")
    except WheelsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
