"""The verdict on each mutant, stored by digest of the sources and tests that decided it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutants.mutate import Mutant
from tests.mutants.targets import ROOT, file_digest


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a mutant ended."""

    killer: str
    """The test that failed, `time` if it never ended; empty if it survived."""
    basis: str
    """Digest of the test file that killed it, or of all tests that let it live."""


class Verdicts:
    """Verdicts in an append-only file of JSON lines, so that a kill loses nothing."""

    def __init__(self, cache: Path) -> None:
        self._file = cache / "verdicts.jsonl"
        self._known: dict[str, Verdict] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # truncated by a kill
                key = row.pop("key")
                self._known[key] = Verdict(**row)

    def get(self, mutant: Mutant, tests: Sequence[str]) -> Verdict | None:
        """The verdict on a mutant, if its source and the deciding tests are unchanged."""
        known = self._known.get(_key(mutant))
        if known is None:
            return None
        return known if known.basis == _basis(known.killer, tests) else None

    def lived(self, mutant: Mutant) -> bool:
        """True if it survived other tests, or an earlier version of these."""
        known = self._known.get(_key(mutant))
        return known is not None and not known.killer

    def add(self, mutant: Mutant, tests: Sequence[str], killer: str) -> None:
        """Remember a verdict."""
        verdict = Verdict(killer=killer, basis=_basis(killer, tests))
        self._known[_key(mutant)] = verdict
        with self._file.open("a") as file:
            file.write(json.dumps({"key": _key(mutant), **asdict(verdict)}) + "\n")


def _key(mutant: Mutant) -> str:
    return f"{file_digest(mutant.path)}-{mutant.key}"


def _basis(killer: str, tests: Sequence[str]) -> str:
    file = killer.split("::")[0]
    if killer and (ROOT / file).is_file():
        return file_digest(file)
    files = sorted({test.split("::")[0] for test in tests})
    text = "\n".join([*sorted(tests), *(file_digest(file) for file in files)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
