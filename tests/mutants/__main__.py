"""`make mutants`: try all mutants, SAMPLE=n of them with SEED=s, or those of PATCH=file.diff.

Verdicts are kept in ~/.cache/tapir/mutants (or TAPIR_MUTANTS), so that a run continues where the
last one ended, and mutants of unchanged files are not tried again.
"""

import argparse
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a worker a core

from tests.mutants.child import try_sources
from tests.mutants.loop import killer_of, try_all
from tests.mutants.made import make_data
from tests.mutants.mutate import Mutant, mutants_of
from tests.mutants.patch import patched
from tests.mutants.pool import preload, run_forks
from tests.mutants.report import tell, unlisted
from tests.mutants.select import Selection, selection
from tests.mutants.targets import PACKAGES, ROOT, targets
from tests.mutants.verdicts import Verdicts

FIRST = ["torch", "torch._refs", "numpy", "deepspeed", "hypothesis", "PIL.Image", "torch.testing"]
"""Imported before the tests are measured; what they import then is known."""
_PATIENCE = 120.0
"""Seconds of tests that a given diff must survive."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="mutants to try; 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", nargs="*", default=[""], help="of files whose path begins so")
    parser.add_argument("--patch", type=Path, help="a diff to try instead")
    parser.add_argument("--width", type=int, default=min(os.cpu_count() or 1, 8))
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no fork outlives it
    cache = Path(os.environ.get("TAPIR_MUTANTS", Path.home() / ".cache/tapir/mutants"))
    cache.mkdir(parents=True, exist_ok=True)
    make_data(cache)
    preload(FIRST, PACKAGES)
    chosen = selection(cache, asked.width)
    preload(chosen.modules, PACKAGES)
    if asked.patch:
        return _try_patch(asked.patch, chosen)
    everything = [m for m in all_mutants() if m.path.startswith(tuple(asked.only))]
    if asked.sample:
        everything = random.Random(asked.seed).sample(
            everything, min(asked.sample, len(everything))
        )
    return _try(everything, chosen, Verdicts(cache), asked.width)


def all_mutants() -> list[Mutant]:
    """Every mutant of every target, in the order of files and lines."""
    mutants = []
    for target in targets():
        mutants += mutants_of(target.path, (ROOT / target.path).read_bytes(), target.functions)
    return mutants


def _try(mutants: list[Mutant], chosen: Selection, verdicts: Verdicts, width: int) -> int:
    open_ = [m for m in mutants if verdicts.get(m, chosen.of(m)) is None]
    open_.sort(key=lambda mutant: not verdicts.lived(mutant))  # survivors may have new tests
    print(f"{len(mutants)} mutants, {len(open_)} to try", flush=True)
    if open_:
        try_all(open_, chosen, verdicts, width)
    return _report(mutants, chosen, verdicts)


def _report(mutants: list[Mutant], chosen: Selection, verdicts: Verdicts) -> int:
    decided = ((mutant, verdicts.get(mutant, chosen.of(mutant))) for mutant in mutants)
    for path, label in unlisted(all_mutants()):
        print(f"listed as equivalent, but it is not a mutant: {path}: {label}")
    killers = {mutant: verdict.killer for mutant, verdict in decided if verdict is not None}
    code = tell(killers)
    if left := len(mutants) - len(killers):
        print(f"{left} mutants have no verdict: the run ended before they were tried, see above")
        return 2
    return code


def _try_patch(patch: Path, chosen: Selection) -> int:
    changed = patched(patch.read_bytes())
    nearest = [
        t for c in changed for n in c.lines for t in chosen.tests_of(c.path, n, n, _PATIENCE)
    ]
    others = [t for c in changed for t in chosen.tests_of(c.path, 0, 0, _PATIENCE)]
    tests = list(dict.fromkeys([*nearest, *others]))
    if not tests:
        print(f"{patch}: no test runs these lines: survived")
        return 1
    seconds = 60 + 6 * sum(chosen.seconds[test] for test in tests)
    sources = {c.path: c.source for c in changed}
    work = partial(try_sources, sources, tests, seconds=chosen.seconds)
    for _, folder, status in run_forks(iter([(patch, work, seconds)]), 1):
        killer = killer_of(folder, status)
        print(f"{patch}: " + (f"caught by {killer}" if killer else f"survived {len(tests)} tests"))
        return 0 if killer else 1
    return 1


if __name__ == "__main__":
    sys.exit(main())
