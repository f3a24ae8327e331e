"""Every benchmark runs in miniature, from a folder of files named like Python's modules."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.__main__ import names
from bench.loader import CONSTRAINTS, PACKAGES
from bench.support.children import ROOT, child_environment, module_command
from bench.support.sizes import TINY
from tests.harness import ENVIRONMENT

FLAGS = {"gpu": ["--device=cpu", "--only=ceilings,compression", "--out=gpu"]}
SECONDS = 240
"""Of a miniature, on a machine that does other work; a benchmark in full takes longer."""
HIDING = ("profile", "random", "statistics", "json", "queue")
"""Python's modules that files in the current folder are called as."""


def test_every_file_with_a_benchmark_is_listed() -> None:
    listed = {"attention", "gpu", "loader", "profile", "stream", "train_step"}
    assert listed < set(names()) and not {"workers", "loader_child", "sizes"} & set(names())


@pytest.mark.parametrize("name", names())
def test_a_benchmark_has_sizes_for_a_miniature(name: str) -> None:
    files = [ROOT / "bench" / f"{name}.py", *(ROOT / "bench" / name).glob("*.py")]
    text = "".join(path.read_text() for path in files if path.exists())
    assert re.search(r"\bsized\(|report\.tiny", text), f"bench {name} has no miniature"


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_benchmark_runs_in_miniature(name: str, tokens: Path, tmp_path: Path) -> None:
    for module in HIDING:
        (tmp_path / f"{module}.py").write_text("raise ImportError('not of Python')")
    environment = {**child_environment(ENVIRONMENT), "TAPIR_BENCH_TOKENS": str(tokens)}
    done = subprocess.run(
        module_command("bench", name, "--json", "--tiny", *FLAGS.get(name, [])),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    body = json.loads(done.stdout.splitlines()[-1])
    assert body["bench"] == name and body["rows"]
    for row in body["rows"]:
        assert row["name"] and row["baseline"], row
        low, high = row["spread"]
        assert math.isfinite(row["value"]) and low <= high, row


def test_what_other_loaders_need_goes_with_the_constraints() -> None:
    """Their environments are made in full runs alone."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line[:60]]
    pins = {req.name.lower(): req.specifier for req in map(Requirement, lines)}
    for name, packages in PACKAGES.items():
        for needed in map(Requirement, packages):
            (version,) = {pin.version for pin in pins.get(needed.name.lower(), ())} or {None}
            assert version is None or needed.specifier.contains(version), f"{name}: {needed}"


def test_a_miniature_is_asked_for_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ranks and workers of a benchmark have its sizes."""
    from bench.support.sizes import cache, sized

    monkeypatch.delenv(TINY, raising=False)
    assert sized(7, 1) == 7 and cache("x") == Path(".cache/bench-x")
    monkeypatch.setenv(TINY, "1")
    assert sized(7, 1) == 1 and cache("x") == Path(".cache/bench-x-tiny")
