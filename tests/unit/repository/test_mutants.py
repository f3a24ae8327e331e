"""What `make mutants` changes, how a diff is tried, and when a verdict is reused."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import DEVELOPERS

pytest.importorskip("coverage", reason=DEVELOPERS)

from tests.mutants import report, select, verdicts
from tests.mutants.__main__ import all_mutants
from tests.mutants.mutate import apply, mutants_of
from tests.mutants.patch import patched
from tests.mutants.pool import run_forks
from tests.mutants.targets import ROOT
from tests.mutants.verdicts import Verdicts
from tests.mutants.warm import patch_of

SOURCE = b'''"""Two % of this is no code."""
WIDTH: int = 3
@cached(size=5)
def f(x: int, y=0.5, *, mode: str = "a") -> int:
    """Nor this: 1 + 1."""
    if x >= 2 and not y:
        raise ValueError("1 + 1", 2)
    z = zip(x, y, strict=True)
    LOG.info("%d", x + 1)
    return g(-x ** 2, axis=1) if x is None else x
'''


def test_each_operator_sign_comparison_constant_default_and_keyword_is_changed() -> None:
    mutants = mutants_of("x.py", SOURCE, frozenset())
    changed = {apply(SOURCE, m).decode() for m in mutants}
    assert len(changed) == len(mutants) == 14
    text = SOURCE.decode()
    for old, new in [
        ("WIDTH: int = 3", "WIDTH: int = 4"), ("y=0.5", "y=1.0"), ('"a"', "'a_'"),
        (">= 2", "> 2"), (">= 2", "< 2"), (">= 2", ">= 3"), ("and not", "or not"),
        ("not y", " y"), ("(-x", "(x"), ("** 2", "* 2"), ("** 2", "** 3"), ("axis=1", "axis=2"),
        (", axis=1", ""), ("is None", "is not None"),
    ]:  # fmt: skip
        assert text.replace(old, new, 1) in changed, (old, new)


def test_only_the_named_functions_of_a_file_are_changed() -> None:
    source = b"A = 1\ndef f():\n    return 2\ndef g():\n    return 3\n"
    (only,) = mutants_of("x.py", source, frozenset({"g"}))
    assert (only.line, only.lines, only.label) == (5, (5, 5), "return 3  ->  return 4")
    several = mutants_of("x.py", b"f(\n    a=b,\n    c=d,\n)\n", frozenset())
    assert [m.label for m in several] == ["a=b, c=d,  ->  c=d,", "a=b, c=d,  ->  a=b,"]


WHOLE = b"""
A = 1
def f(x, y=2):
    def inner(z):
        return z + 3
    return inner(x) * y
class C:
    b = 4
    def g(self):
        return [each - 5 for each in range(6)]
"""


def test_a_change_inside_of_functions_needs_no_new_import() -> None:
    def changed(old: bytes, new: bytes) -> set[str] | None:
        assert WHOLE.count(old) == 1
        patch = patch_of("x.py", WHOLE, WHOLE.replace(old, new))
        return None if patch is None else {name for _, name, _ in patch.codes}

    assert changed(b"z + 3", b"z + 30") == {"f", "f.<locals>.inner"}
    assert changed(b"(x) * y", b"(x) / y") == {"f"}
    assert changed(b"each - 5", b"each - 50") == {"C.g", "C.g.<locals>.<listcomp>"}
    assert "C.g" in (changed(b"(6)", b"(60)") or ())
    assert changed(b"A = 1", b"A = 10") is changed(b"y=2", b"y=20") is changed(b"4", b"40") is None
    assert changed(b"z + 3", b"y + 3") is None  # another closure


def test_changed_code_is_that_of_a_new_import() -> None:
    names: dict[str, Any] = {}
    exec(compile(WHOLE, "x.py", "exec"), names)
    patch = patch_of("x.py", WHOLE, WHOLE.replace(b"z + 3", b"z + 30").replace(b"- 5", b"- 50"))
    assert patch is not None and names["f"](1) == 8
    for (_, name, _), code in patch.codes.items():
        if name in ("f", "C.g"):
            (names["f"] if name == "f" else names["C"].g).__code__ = code
    assert names["f"](1) == 62 and names["C"]().g() == [-50, -49, -48, -47, -46, -45]


def test_there_are_at_least_two_thousand_and_all_of_them_compile() -> None:
    mutants = all_mutants()
    assert len(mutants) >= 2000 and len({(m.path, m.key) for m in mutants}) == len(mutants)
    for mutant in mutants[::20]:
        compile(apply(Path(mutant.path).read_bytes(), mutant), mutant.path, "exec")


def test_a_diff_is_applied_to_copies(tmp_path: Path) -> None:
    before = Path("models/attention/masks.py").read_bytes()
    assert b"causal = offset >= 0" in before
    line = before.decode().split("\n").index("    causal = offset >= 0") + 1
    diff = (
        "--- a/models/attention/masks.py\n+++ b/models/attention/masks.py\n"
        f"@@ -{line} +{line} @@\n-    causal = offset >= 0\n+    causal = offset > 0\n"
    )
    (changed,) = patched(diff.encode())
    assert changed.path == "models/attention/masks.py"
    assert changed.source == before.replace(b"offset >= 0", b"offset > 0", 1)
    assert changed.lines == (line,)
    assert Path("models/attention/masks.py").read_bytes() == before
    with pytest.raises(SystemExit, match="does not apply"):
        patched(diff.replace(">= 0", ">= 7").encode())
    with pytest.raises(SystemExit, match="not a file of this tree"):
        patched(diff.replace("masks.py", "none.py").encode())


def test_a_verdict_stands_until_what_decided_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {"x.py": "1", "tests/a.py": "1", "tests/b.py": "1"}
    monkeypatch.setattr(verdicts, "file_digest", lambda path: digests[path])
    monkeypatch.setattr(verdicts, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"tests/{name}.py").touch()
    mutant, other = mutants_of("x.py", b"A = 1\nB = 2\n", frozenset())
    tests = ["tests/a.py::t", "tests/b.py::t"]
    known = Verdicts(tmp_path)
    known.add(mutant, tests, "tests/a.py::t")
    known.add(other, tests, "")
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    again = Verdicts(tmp_path)
    assert [bool(again.get(m, tests)) for m in (mutant, other)] == [True, True]
    digests["tests/b.py"] = "2"
    assert [bool(again.get(m, tests)) for m in (mutant, other)] == [True, False]
    digests["tests/a.py"] = "2"
    assert again.get(mutant, tests) is None
    digests["tests/a.py"] = "1"
    digests["x.py"] = "2"
    assert again.get(mutant, tests) is None


def test_all_that_is_listed_as_equivalent_is_a_mutant_of_the_tree() -> None:
    """An entry whose line was changed is to be looked at again, or to go."""
    assert report.unlisted(all_mutants()) == []
    assert all(len(why) > 20 for why in report.equivalents().values())


def test_survivors_are_known_or_new(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mutants = mutants_of("x.py", b"A = 1\nB = 2\nC = 3\n" + b"D = 4\n" * 97, frozenset())
    known = {("x.py", "A = 1  ->  A = 2"): "why", ("x.py", "B = 2  ->  B = 3"): "why"}
    monkeypatch.setattr(report, "equivalents", lambda: {**known, ("y.py", "gone"): "why"})
    assert report.unlisted(mutants) == [("y.py", "gone")]
    killers = dict.fromkeys(mutants, "tests/a.py::t")
    killers[mutants[0]] = killers[mutants[2]] = ""
    assert report.tell(killers) == 0
    assert capsys.readouterr().out.splitlines() == [
        "alive, known: x.py:1 [constant] A = 1  ->  A = 2",
        "listed as equivalent, but tests/a.py::t catches it: x.py: B = 2  ->  B = 3",
        "alive, NEW: x.py:3 [constant] C = 3  ->  C = 4",
        "x.py: 100 mutants, 2 alive",
        "100 mutants, 2 alive (2.0%, at most 3%), 1 of them new",
    ]
    killers[mutants[3]] = killers[mutants[4]] = ""
    assert report.tell(killers) == 1


@pytest.mark.seconds
def test_what_others_take_of_a_core_is_not_a_forks_time() -> None:
    """Five forks need 0.6 s of one core each: the last ends after 3 s, and its limit is 2.4 s."""
    core = min(os.sched_getaffinity(0))

    def work(folder: Path) -> None:
        os.sched_setaffinity(0, {core})
        while time.process_time() < 0.6:
            pass

    ends = [status for _, _, status in run_forks(iter([(i, work, 2.4) for i in range(5)]), 5)]
    assert ends == [0] * 5


def test_forks_end_in_their_time_and_leave_nothing() -> None:
    def spin(folder: Path) -> None:
        while True:
            pass

    jobs = [("fine", lambda folder: (folder / "x").touch(), 60.0), ("slow", spin, 0.1)]
    folders = {}
    for key, folder, status in run_forks(iter(jobs), 2):
        assert (status is None) == (key == "slow") and (folder / "x").exists() == (key == "fine")
        folders[key] = folder
    assert not any(folder.exists() for folder in folders.values())


def test_tests_that_pin_are_tried_wherever_they_stand() -> None:
    pins = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_pins_*.py")}
    assert len(pins) >= 10 and pins <= set(select.pinning_files())
