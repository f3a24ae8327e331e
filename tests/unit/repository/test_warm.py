"""Commands run as forks of a warm process give the same results as a user's commands."""

from pathlib import Path

import pytest

from tests import harness
from tests.harness import cold_tapir, tapir


@pytest.mark.world
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["pack", "nowhere", "{tmp}/out"], 2),
        (["plan", "tiny", "--no-such-flag"], 2),
        (["train", "clip", "tiny", "--data={tmp}", "--bpe={tmp}", "--mesh.data=2"], 2),
    ],
)
def test_a_warm_command_ends_as_a_cold_one(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "_cold", harness.COLD)
    given = [part.format(tmp=tmp_path) for part in arguments]
    cold = cold_tapir(*given, code=code)
    assert _output(tapir(*given, code=code)) == _output(cold)
    with pytest.raises(AssertionError, match=f"exit {code}, not 0"):
        tapir(*given)


def _output(text: str) -> list[str]:
    """Drops gloo's lines about ended peers, whose order varies."""
    return [line for line in text.splitlines() if not line.startswith("[")]
