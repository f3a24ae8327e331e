"""Flags and files from before the renaming still work; before/README.md lists them."""

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.images.decode import decode_rgb
from tests.harness import rows_of, tapir
from training.export.weights import read_description
from training.run.folder import read_metrics

pytestmark = pytest.mark.seconds

BEFORE = Path(__file__).with_name("before")
CAPTION = "a small red circle"
FLAGS = """
--loop.batch 8 --loop.log-every 1 --loop.validation-samples 8 --order.lanes 4 --order.window 2
--optim.warmup 2 --supervisor.restarts 0 --engine.precision fp32 --engine.matmul-precision highest
--profile.peak-tflops 0.1 --loop.steps 8 --loop.validate-every 2 --checkpoint.every 4
--checkpoint.keep 1 --mesh.data 2 --engine.accumulate 2 --compress.rank 2 --compress.warm-start
--optim.ema 0.9 --optim.ema-every 2 --caption-drop 0.25 --model.dim 16 --model.heads 2
--model.layers 2 --model.text-length 8 --model.conv-kernel 3
"""
"""The flags of the prior's run, as its user typed them before."""
OLD = "has old names"
LOSSES = ("loss", "text_loss", "image_loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, moved so that its absolute paths are wrong."""
    return Path(shutil.copytree(BEFORE, tmp_path_factory.mktemp("before") / "run"))


@pytest.fixture(scope="module")
def resumed(before: Path) -> str:
    """Output of the command, with its old flags, that resumes the stopped prior to its end."""
    places = [f"--data={before / 'tokens'}", f"--out={before / 'prior'}"]
    return tapir("train", "prior", "tiny", *places, *FLAGS.split())


@pytest.fixture(scope="module")
def same_bits(before: Path, resumed: str) -> bool:
    """True on a machine that rounds as the one that made the miniature."""
    old, new = (read_description(before / name, "prior")["facts"] for name in ("whole", "prior"))
    assert ("was computed otherwise" in resumed) == (old["numerics"] != new["numerics"])
    return bool(old["numerics"] == new["numerics"])


def models(before: Path, prior: str = "whole") -> list[str]:
    """Flags for the models of the miniature."""
    folders = {"prior": prior, "dvae": "dvae", "clip": "clip", "bpe": "bpe"}
    return [f"--{name}={before / folder}" for name, folder in folders.items()]


def test_the_data_sets_and_the_checkpoint_are_whole(before: Path) -> None:
    for place in ("raw", "tokens", "prior/checkpoints/step-4", "whole"):
        assert '"verified"' in tapir("verify", str(before / place))


def test_an_old_stopped_prior_resumes_to_the_unbroken_result(
    before: Path, resumed: str, same_bits: bool
) -> None:
    assert "resumed from" in resumed and "step-4" in resumed
    for split in ("train", "validation"):
        new, old = rows_of(before / "prior", split), rows_of(BEFORE / "whole", split)
        old = [
            row for row in old if split == "train" or row["step"] != 4
        ]  # the step at which it was stopped
        assert [row["step"] for row in new] == [row["step"] for row in old]
        for mine, theirs in zip(new, old, strict=True):
            for name in LOSSES:
                expected = theirs.get(name)
                if not same_bits and expected is not None:  # another CPU rounds differently
                    expected = pytest.approx(expected, rel=1e-4)
                assert mine.get(name) == expected, (split, mine["step"], name)
    config = json.loads((before / "prior" / "config.json").read_text())
    assert config["loop"]["stop_at"] == 0 and "until" not in config["loop"]
    if same_bits:
        digests = [
            read_description(before / name, "prior")["sha256"] for name in ("whole", "prior")
        ]
        assert digests[0] == digests[1]


def test_each_old_file_is_reported_once(before: Path, resumed: str) -> None:
    first, *notices = resumed.split(OLD)
    assert len(notices) == 2, resumed
    assert first.endswith("the command line ") and "\n  --engine.accumulate is now" in notices[0]
    assert "step-4" in notices[0] and "\n  loop.until is now loop.stop_at\n" in notices[1]


def test_old_metrics_are_read_under_the_new_keys(before: Path) -> None:
    rows = read_metrics(before / "dvae")
    assert all("codebook_usage" in row for row in rows if row.get("split") == "validation")
    assert all("data_wait_fraction" in row for row in rows if "split" not in row)


def test_an_old_run_reports_what_was_read(tmp_path: Path, before: Path) -> None:
    run = shutil.copytree(BEFORE / "prior", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"] = str(before / "tokens")  # the stored path is of another machine
    (run / "config.json").write_text(json.dumps(config))
    text = tapir("batch", "5", f"--run={run}")
    assert text.count(OLD) == 1 and ".tar block" in text


def test_old_models_are_exported_and_imported(before: Path, resumed: str, tmp_path: Path) -> None:
    tapir("export", str(before), str(tmp_path / "hub"), *models(before))
    tapir("import", str(tmp_path / "hub"), str(tmp_path / "again"))
    for stage, name in (("prior", "whole"), ("dvae", "dvae"), ("clip", "clip")):
        old = read_description(BEFORE / name, stage)
        assert read_description(tmp_path / "again" / stage, stage)["sha256"] == old["sha256"]


def test_an_old_export_is_imported(before: Path, tmp_path: Path) -> None:
    tapir("import", str(before / "hub"), str(tmp_path / "in"))
    old = read_description(BEFORE / "dvae", "dvae")
    assert read_description(tmp_path / "in" / "dvae", "dvae")["sha256"] == old["sha256"]


def test_pictures_equal_the_old_ones(before: Path, same_bits: bool, tmp_path: Path) -> None:
    draw = ["--candidates=4", "--show=4"]
    tapir("sample", CAPTION, f"--out={tmp_path / 'a.png'}", *models(before), *draw)
    new, old = ((p.read_bytes(), str(p)) for p in (tmp_path / "a.png", BEFORE / "sample.png"))
    assert decode_rgb(*new).shape == decode_rgb(*old).shape
    if same_bits:
        assert (decode_rgb(*new) == decode_rgb(*old)).all()


def test_an_old_checkpoint_is_sampled(before: Path, tmp_path: Path) -> None:
    stopped = shutil.copytree(BEFORE / "prior", tmp_path / "stopped")
    flags = [*models(before)[1:], f"--prior={stopped}", "--candidates=2", "--show=2"]
    flags.append("--guidance=2")  # needs the fact that captions were dropped
    text = tapir("sample", CAPTION, f"--out={tmp_path / 'a.png'}", *flags)
    assert (tmp_path / "a.png").exists() and "step-4" in text


def test_an_old_run_file_is_submitted(tmp_path: Path) -> None:
    text = tapir("submit", str(BEFORE / "run.yaml"), "--dry-run", cwd=tmp_path)
    assert text.count(OLD) == 1 and text.count(" is now ") == 10
    assert "  and 15 more (docs/decisions/021-names.md)\n" in text
    commands = [line for line in text.splitlines() if " is now " not in line]
    for old in (
        "--loop.until",
        "--engine.accumulate",
        "--most=",
        "--model.start",
        "--caption-drop=",
    ):
        assert not any(old in line for line in commands), old
    for stage in ("pack", "bpe", "dvae", "tokenize", "prior", "clip", "evaluate"):
        assert f"# {stage}\n" in text


def test_a_report_of_an_old_run_is_written(before: Path) -> None:
    tapir("report", str(before))
    assert CAPTION.split()[-1] in (before / "report.html").read_text()
