"""Batch scripts: options as sbatch reads them, spares, arrays in parts, the printed script."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.chain import Chain, Job, Resources
from cluster.slurm.arrays import Part, parts_of
from cluster.slurm.config import SlurmConfig, folder_problems
from cluster.slurm.script import render
from cluster.slurm.submit import dry_run, sbatch_command

ODD = 'it\'s "50%" # $HOME'


def chain_of(*jobs: Job, out: str = "/runs/x", folder: str = "/home/me") -> Chain:
    return Chain(name="x", out=Path(out), folder=Path(folder), python="/py", jobs=jobs)


def prior(**resources: Any) -> Job:
    return Job(
        name="prior",
        command=("train", "prior", "tiny"),
        ranks=2,
        trains=True,
        resources=Resources(nodes=2, cpus=4, **resources),
    )


def tokenize(workers: int, **resources: Any) -> Job:
    needs = Resources(workers=workers, **resources)
    return Job(name="tokenize", command=("tokenize", "a"), array=True, resources=needs)


def options(text: str) -> dict[str, str]:
    """The #SBATCH options of a script."""
    rows = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line[:7] == "#SBATCH"]
    return {name: value for name, _, value in (row.partition("=") for row in rows)}


def command(text: str) -> list[str]:
    """The words of a script's last command."""
    return shlex.split(text.partition("\nexec ")[2].replace("\\\n", " "))


def test_a_job_without_spares_fails_with_its_nodes() -> None:
    text = render(chain_of(prior()), prior(), SlurmConfig())
    given = options(text)
    assert given["--nodes"] == "2" and given["--ntasks-per-node"] == "1"
    assert "--no-kill" not in given
    words = command(text)
    assert "--nodes=2" not in words[: words.index("--")]
    assert not any("nodelist" in word or word == "--overlap" for word in words)


def test_each_restart_has_another_port() -> None:
    lines = render(chain_of(prior()), prior(), SlurmConfig()).splitlines()
    port = next(line for line in lines if line.startswith("export MASTER_PORT="))

    def of(restarts: str) -> str:
        shown = f"SLURM_JOB_ID=39999; {restarts} {port}; echo $MASTER_PORT"
        return subprocess.check_output(["bash", "-c", shown]).decode().strip()

    assert of("") == "23999" and of("SLURM_RESTART_COUNT=2;") == "25993"


def test_a_job_with_spares_asks_for_a_range_and_lists_its_own_nodes() -> None:
    job = prior(spares=3)
    text = render(chain_of(job), job, SlurmConfig())
    given = options(text)
    assert given["--nodes"] == "2-5" and given["--no-kill"] == ""
    assert "--ntasks-per-node" not in given, "Slurm would give no more nodes than tasks"
    words = command(text)
    cut = words.index("--")
    assert "--nodes=2" in words[:cut] and words[cut + 1 : cut + 9] == [
        *("srun", "--export=ALL", "--kill-on-bad-exit=1", "--nodes=2"),
        *("--nodelist={nodes}", "--overlap", "--ntasks=2", "--ntasks-per-node=1"),
    ]


def test_srun_as_launcher_has_the_list_too() -> None:
    job = prior(spares=1)
    words = command(render(chain_of(job), job, SlurmConfig(launcher="srun")))
    assert {"--nodelist={nodes}", "--overlap", "--ntasks=4", "--ntasks-per-node=2"} <= set(words)


def test_options_are_quoted_as_sbatch_reads_them() -> None:
    chain = chain_of(prior(), out=f"/a/{ODD}", folder=f"/a/{ODD}")
    config = SlurmConfig(extra=('--comment=it\'s "a" \\ #', "--exclusive"), constraint="a|b#c")
    text = render(chain, prior(), config)
    given = options(text)
    assert given["--output"] == '"/a/it\'s \\"50%%\\" # $HOME/logs/prior.log"'
    assert given["--comment"] == '"it\'s \\"a\\" \\\\ #"'
    assert given["--constraint"] == '"a|b#c"' and given["--exclusive"] == ""
    assert f"--out=/a/{ODD}" in command(text)
    cd = next(line for line in text.splitlines() if line.startswith("cd "))
    assert shlex.split(cd)[1] == f"/a/{ODD}"


def test_no_text_of_a_run_file_becomes_a_line_of_its_own() -> None:
    odd = "x\n#SBATCH --nodes=9\nSCRIPT\ntouch /tmp/no"
    job = Job(name="bpe", command=("train", "bpe", f"--texts={odd}"))
    chain = chain_of(job)
    text = render(chain, job, SlurmConfig())
    head = text.partition("\ncd ")[0]
    assert head.splitlines().count("#SBATCH --nodes=9") == 0
    assert f"--texts={odd}" in command(text)
    script = dry_run(chain, SlurmConfig())
    assert "<<'SCRIPT_'" in script and subprocess.run(["bash", "-nc", script]).returncode == 0


@pytest.mark.parametrize(
    ("workers", "limit", "expected"),
    [
        (4, 1001, [(0, 4)]),
        (1001, 1001, [(0, 1001)]),
        (1002, 1001, [(0, 1000), (1000, 2)]),
        (25, 10, [(0, 10), (10, 10), (20, 5)]),
        (30, 29, [(0, 10), (10, 10), (20, 10)]),
        (3, 2, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_arrays_are_split(workers: int, limit: int, expected: list[tuple[int, int]]) -> None:
    assert [(part.first, part.count) for part in parts_of(workers, limit)] == expected


@pytest.mark.parametrize(("workers", "limit"), [(4, 1001), (25, 10), (2345, 1001), (5, 3)])
def test_logs_are_called_by_the_workers_number(workers: int, limit: int) -> None:
    names = []
    for part in parts_of(workers, limit):
        for task in range(part.count):
            padded = f"{task:0{part.digits}d}"
            names.append(part.log.replace(f"%{part.digits}a", padded).replace("%a", str(task)))
    assert names == [str(worker) for worker in range(workers)]


def test_a_part_knows_its_workers_numbers() -> None:
    job = tokenize(25, parallelism=3)
    text = render(chain_of(job), job, SlurmConfig(), Part(first=10, count=10, digits=1))
    assert options(text)["--array"] == "0-9%3"
    assert options(text)["--output"] == "/runs/x/logs/tokenize-1%1a.log"
    line = next(line for line in text.splitlines() if "TAPIR_WORKER=" in line)
    shown = f"SLURM_ARRAY_TASK_ID=7; {line}; echo $TAPIR_WORKER"
    assert subprocess.check_output(["bash", "-c", shown]).decode() == "17/25\n"
    whole = render(chain_of(job), job, SlurmConfig(), Part(first=0, count=25, digits=2))
    assert "TAPIR_WORKER" not in whole and options(whole)["--array"] == "0-24%3"
    assert options(whole)["--output"] == "/runs/x/logs/tokenize-%a.log"


def test_a_job_waits_for_all_parts_and_a_part_for_the_one_before() -> None:
    job, later = tokenize(25), Job(name="prior", command=("train",), after=("tokenize", "bpe"))
    chain = chain_of(job, later)
    words = sbatch_command(chain, later, {"tokenize": "12:13:14", "bpe": "9"})
    assert "--dependency=afterok:12:13:14:9" in words
    part = Part(first=10, count=10, digits=1)
    words = sbatch_command(chain, tokenize(25), {}, part, before="12")
    assert "--dependency=afterany:12" in words
    assert words[-1] == "/runs/x/jobs/tokenize-10.sh"


def test_the_printed_script_has_slurms_default_limit() -> None:
    job, later = (
        tokenize(1500, parallelism=9),
        Job(name="prior", command=("t",), after=("tokenize",)),
    )
    text = dry_run(chain_of(job, later), SlurmConfig())
    assert "# arrays are split for MaxArraySize=1001, Slurm's default" in text
    assert "--array=0-999%9" in text and "--array=0-499%9" in text
    assert "--dependency=afterany:$tokenize /runs/x/jobs/tokenize-1000.sh)" in text
    assert "\ntokenize=$tokenize:$tokenize_1000\n" in text
    assert "--dependency=afterok:$tokenize " in text
    free = dry_run(chain_of(tokenize(1500), later), SlurmConfig())
    assert "afterany" not in free
    assert "MaxArraySize" not in dry_run(chain_of(later), SlurmConfig())


def test_a_printed_path_is_no_command(tmp_path: Path) -> None:
    job = Job(name="pack", command=("pack", "shapes"))
    out = tmp_path / "$(touch no) `touch no`"
    (tmp_path / "sbatch").write_text('#!/bin/bash\nprintf "%s" "${@: -1}" > "$SEEN"\necho 5\n')
    (tmp_path / "sbatch").chmod(0o755)
    seen = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SEEN": str(tmp_path / "seen")}
    script = dry_run(chain_of(job, out=str(out)), SlurmConfig())
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=seen)
    assert (tmp_path / "seen").read_text() == str(out / "jobs" / "pack.sh")
    assert not (tmp_path / "no").exists()


def test_the_printed_script_sends_jobs_with_hyphens_in_their_names(tmp_path: Path) -> None:
    array = Job(name="suite-b-c", command=("t",), array=True, resources=Resources(workers=1500))
    last = Job(name="report", command=("report",), after=("suite-panels", "suite-b-c"))
    chain = chain_of(Job(name="suite-panels", command=("t",)), array, last, out=str(tmp_path))
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$@" >> sent\nwc -l < sent\n')
    (tmp_path / "sbatch").chmod(0o755)
    script = dry_run(chain, SlurmConfig())
    seen = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=seen)
    sent = (tmp_path / "sent").read_text().splitlines()
    assert len(sent) == 4 and "--dependency=afterok:1:2:3 " in sent[-1]


def test_folders_and_options_that_slurm_cannot_take_are_refused() -> None:
    assert folder_problems(Path('/a/it\'s "x" # 50%')) == []
    assert "backslashes" in folder_problems(Path("/a\\b"))[0]
    assert "line breaks" in folder_problems(Path("/a\nb"))[0]
    assert SlurmConfig(extra=("--comment=a b", "--exclusive")).problems() == []
    assert "must begin with --" in SlurmConfig(extra=("comment=x",)).problems()[0]
    assert "one line" in SlurmConfig(extra=("--comment=a\n#SBATCH --x",)).problems()[0]
    assert "spaces" in SlurmConfig(partition="a\nb").problems()[0]


def test_spares_are_for_several_nodes() -> None:
    assert Resources(nodes=2, spares=1).problems("prior") == []
    assert "must not be negative" in Resources(nodes=2, spares=-1).problems("prior")[0]
    assert "spares are for stages of several nodes" in Resources(spares=1).problems("bpe")[0]
