"""examples/laion.yaml: from tars of img2dataset in S3 to tokens, on Slurm and Kubernetes."""

import re
import subprocess
from pathlib import Path

import yaml

from tests.harness import ROOT, tapir

EXAMPLE = str(ROOT / "examples" / "laion.yaml")


def test_the_script_for_slurm_is_whole(tmp_path: Path) -> None:
    text = tapir("submit", EXAMPLE, "--to=slurm", "--dry-run")
    arrays = re.findall(r"#SBATCH --array=(\S+)", text)
    assert arrays == ["0-63", "0-15", "0-255%128"] and "#SBATCH --nodes=8" in text
    assert "tapir pack s3://laion/img2dataset s3://pairs/laion/raw --in-place" in text
    assert "--min-side=256 --duplicates --near=3" in text
    assert "tapir tokenize s3://pairs/laion/raw s3://pairs/laion/tokens" in text
    script = tmp_path / "submit.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_the_objects_for_kubernetes_are_whole() -> None:
    text = tapir("submit", EXAMPLE, "--to=kubernetes", "--dry-run")
    lines = text[text.index("apiVersion") :].splitlines()
    objects = list(yaml.safe_load_all("\n".join(line for line in lines if line[:1] != "#")))
    assert {each["kind"] for each in objects} >= {"Role", "ConfigMap", "Job"}
    later = "\n".join(line[2:] for line in lines if line.startswith("#"))
    assert re.findall(r"name: laion-(pack|bpe|dvae|tokenize)\n", later)[0] == "pack"
    assert re.findall(r"completions: (\d+)", later) == ["64", "16", "8", "256"]
