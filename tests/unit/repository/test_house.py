"""The house checks detect each violation, with its file and line."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ENVIRONMENT, ROOT
from tests.house import rules
from tests.house.circles import circles
from tests.house.sizes import sizes
from tests.house.sources import Source
from tests.house.words import banned_names, listing, words


def _sources(files: dict[str, str]) -> list[Source]:
    return [Source(path, text) for path, text in files.items()]


BACK = {
    "plain": "import core.low\n",
    "member": "from core import low\n",
    "relative": "from . import low\n",
    "in a function": "def f():\n    from core.low import x\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import core.low\n",
    "importlib": "import importlib\nimportlib.import_module('core.low')\n",
    "importlib, a part": "import importlib\ndef f(n): importlib.import_module(f'core.{n}')\n",
    "registry": "ENGINES = {\n  'one': ('core.low', 'Engine'),\n}\n",
    "launched": "launch('core.low:rank_main', '', 2, [])\n",
    "preload": "PRELOAD = ['torch', 'core.low']\n",
}
"""Forms in which core/high.py may import core/low.py, in its last or only line but one."""


@pytest.mark.parametrize("back", BACK.values(), ids=BACK)
def test_a_circle_is_named_with_both_lines(back: str) -> None:
    files = {"core/low.py": "X = 1\nimport core.high\n", "core/high.py": back}
    (problem,) = circles(_sources(files))
    line = next(i for i, text in enumerate(back.splitlines(), 1) if "low" in text or "{n}" in text)
    assert "core/low.py:2 imports core.high" in problem
    assert f"core/high.py:{line} " in problem and "move what both sides need" in problem


def test_a_circle_over_three_modules_and_a_front_door_is_one_problem() -> None:
    files = {
        "tapir.py": "VERBS = {'plan': ('cli.plan:plan', '')}\n",
        "cli/plan.py": "import core.low\ndef plan(): ...\n",
        "core/low.py": "import importlib\nimportlib.import_module('tapir')\n",
        "core/other.py": "import core.low\n",
    }
    (problem,) = circles(_sources(files))
    assert "circle of 3 modules" in problem and "core/other.py" not in problem


def test_a_package_that_imports_its_parts_and_a_rank_of_its_own_module_are_no_circle() -> None:
    files = {
        "bench/__init__.py": "",
        "bench/gpu/__init__.py": "from bench.gpu.parent import run\n",
        "bench/gpu/parent.py": "import bench.gpu.report\n",
        "bench/gpu/report.py": "",
        "core/job.py": "def rank_main(): launch('core.job:rank_main', '', 2, ['core.job'])\n",
        "core/image.py": "IMAGE = 'tapir:gpu'\nNAME = 'tapir'\n",
        "tapir.py": "import core.image\ndef main(): ...\n",
    }
    assert circles(_sources(files)) == []


def test_an_import_runs_the_packages_above_it() -> None:
    files = {
        "core/__init__.py": "import bench.loader\n",
        "core/low.py": "",
        "bench/loader.py": "import core.low\n",
    }
    (problem,) = circles(_sources(files))
    assert "bench/loader.py:1 imports core;" in problem


def _function(lines: int) -> str:
    return "X = 1\n\n\ndef long():\n" + "    pass\n" * (lines - 1)


def test_a_long_function_is_named() -> None:
    files = {"core/a.py": _function(50), "core/b.py": _function(51), "bench/c.py": _function(51)}
    (problem,) = sizes(_sources(files))
    assert problem.startswith("core/b.py:4: long has 51 lines, more than 50; split")


def test_long_files_full_folders_and_a_large_median_are_named() -> None:
    files = {
        **{f"core/m{i}.py": "" for i in range(14)},
        **{f"models/m{i}.py": "" for i in range(15)},
        "models/sub/long.py": "X = 1\n" * 351,
        "bench/long.py": "X = 1\n" * 600,
        "tests/long.py": "X = 1\n" * 601,
        **{f"tests/faults/m{i}.py": "" for i in range(21)},
    }
    heads = [problem.partition(";")[0] for problem in sizes(_sources(files))]
    assert heads == [
        "models/sub/long.py:351: 351 lines, more than 350",
        "tests/long.py:601: 601 lines, more than 600",
        "models/:1: 15 Python files, more than 14",
        "tests/faults/:1: 21 Python files, more than 20",
    ]
    (problem,) = sizes(_sources({"core/a.py": "X = 1\n" * 151}))
    assert "the median file of the product has 151 lines" in problem


def test_unit_tests_stand_in_the_folder_of_a_package() -> None:
    allowed = ["core/test_a.py", "cli/test_a.py", "repository/test_a.py", "bench/test_a.py"]
    wrong = ["test_a.py", "extras/test_a.py"]
    files = {f"tests/unit/{name}": "" for name in [*allowed, "helper.py", "__init__.py", *wrong]}
    problems = sizes(_sources(files))
    assert [problem.partition(":")[0] for problem in problems] == [
        f"tests/unit/{name}" for name in wrong
    ]


NAMES = """\
import numpy as wanted
def way_back(room, *, kin=1): ...
class WantedRows:
    said: int
    def __init__(self):
        self.is_behind = [spare for spare in ()]
FOUND_ROWS = 1
background, gateway, kind, unfounded = gate.found, wanted(found=1), "found", 2
"""


def test_definitions_of_banned_names_are_listed_and_nothing_else() -> None:
    names = banned_names(_sources({"core/lies/settled_rows.py": NAMES, "core/lies/a.py": ""}))
    assert {(row.line, row.name) for row in names if row.path != "core/lies/a.py"} == {
        *{(1, "settled_rows"), (1, "lies"), (1, "wanted"), (2, "way_back"), (2, "room")},
        *{(2, "kin"), (3, "WantedRows"), (4, "said"), (6, "is_behind"), (6, "spare")},
        (7, "FOUND_ROWS"),
    }
    rows = list(listing(_sources({"core/a.py": "found = 1\nfor way in (): ...\n"})))
    assert rows == ["core/a.py (2): 1 found, 2 way"]


def test_banned_names_are_counted_against_the_ratchet(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = _sources({"core/a.py": "found = 1\nway = 2\n"})
    monkeypatch.setattr(rules, "BANNED_LIMIT", 2)
    assert words(sources) == []
    monkeypatch.setattr(rules, "BANNED_LIMIT", 1)
    (problem,) = words(sources)
    assert "2 names hold a banned word, 1 may" in problem and "--words" in problem
    monkeypatch.setattr(rules, "BANNED_LIMIT", 0)
    assert words(sources)[1].startswith("core/a.py:2: the name way holds a banned word")


def test_the_command_names_every_problem_of_a_tree_and_fails(tmp_path: Path) -> None:
    folder = tmp_path / "core"
    folder.mkdir()
    (folder / "low.py").write_text("import core.high\n")
    (folder / "high.py").write_text(BACK["in a function"] + _function(51))
    hidden = tmp_path / ".venv"
    hidden.mkdir()
    (hidden / "broken.py").write_text("(")
    command = [sys.executable, "-m", "tests.house", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    circle, function = done.stdout.splitlines()
    assert circle.startswith("core/high.py:2: import circle of 2 modules")
    assert function.startswith("core/high.py:6: long has 51 lines")
    assert "2 problems" in done.stderr
