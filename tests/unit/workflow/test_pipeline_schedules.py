"""A pipeline schedule that cannot run is refused before step 1 by train, rehearse and submit."""

from pathlib import Path

import pytest

import training.launch
from cli.cluster import submit
from core.errors import ConfigError
from core.flags import parse_over
from planning.rehearse_presets import laid_out
from tests.unit.workflow.test_needs import run_file
from training.launch import train_stage
from training.presets import PRESETS
from workflow.run_flags import Value, arguments_of

SPLIT: dict[str, Value] = {
    "mesh.data": 1,
    "mesh.pipeline": 2,
    "engine.name": "torch",
    "engine.schedule": "zero-bubble",
    "engine.gradient_accumulation_steps": 2,
}
WRONG: list[tuple[dict[str, Value], str]] = [
    ({"engine.recompute": True}, "use --engine.no-recompute"),
    ({"engine.virtual_stages": 3}, "6 chunks of layers, more than 4 layers"),
    ({"engine.gradient_accumulation_steps": 1, "engine.schedule": "1f1b"}, "on 2 stages; try 2"),
    ({"engine.name": "deepspeed_pipe"}, "use --engine.name torch"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_what_no_device_can_run(flags: dict[str, Value], message: str, tmp_path: Path) -> None:
    given = {**SPLIT, **flags}
    _, refused = laid_out([("prior", "tiny")], arguments_of(given), 2)
    assert message in refused["prior tiny"]
    with pytest.raises(ConfigError, match=message):
        submit([str(run_file(tmp_path, prior={"flags": given})), "--dry-run"])


def test_what_gpus_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "compiled attention on GPUs .*--engine.schedule interleaved --engine.virtual-stages 2"
    for device, refused in (("cpu", 0), ("cuda", 1)):
        _, reasons = laid_out([("prior", "tiny")], arguments_of(SPLIT), 2, device)
        assert len(reasons) == refused
    file = run_file(tmp_path, prior={"flags": SPLIT, "gpus": 2})
    with pytest.raises(ConfigError, match=message):
        submit([str(file), "--to=slurm", "--dry-run"])
    submit([str(file), "--to=local", "--dry-run"])
    monkeypatch.setattr(training.launch, "usable_gpus", lambda: 2)
    flags = [*arguments_of(SPLIT), f"--out={tmp_path}"]
    with pytest.raises(ConfigError, match=message):
        train_stage("prior", parse_over(PRESETS["prior"]["tiny"](), flags, "train"))
