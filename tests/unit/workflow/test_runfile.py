"""Run files: their meaning and their errors."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.cluster import submit
from cluster.chain import Submitted, read_submitted, write_marker, write_submitted
from cluster.slurm.submit import sbatch_command
from core.errors import ConfigError, CorruptError, InputError, TapirError
from tests.harness import ROOT, tapir
from workflow.chain.inputs import unfinished_inputs
from workflow.chain.stages import chain_of, settings_of_stages
from workflow.chain.states import wait_for
from workflow.run_file import read_runfile

RUN: dict[str, Any] = {
    "name": "shapes",
    "out": "/runs/shapes",
    "stages": {
        "pack": {"source": "shapes", "flags": {"count": 600}},
        "bpe": None,
        "dvae": {"flags": {"loop.steps": 6, "mesh.data": 1}},
        "tokenize": {"workers": 4, "parallelism": 2},
        "prior": {
            "nodes": 2,
            "gpus": 2,
            "memory": "64G",
            "minutes": 30,
            "flags": {"mesh.data": 4, "compress.warm_start": True},
        },
        "clip": {"flags": {"mesh.data": 1}},
        "score": {"source": "coco:/data/coco", "workers": 3, "flags": {"candidates": 2}},
        "evaluate": {"flags": {"prompts": 8}},
    },
    "kubernetes": {"claim": "runs", "secrets": ["s3"], "config_maps": ["s3"], "queue": "gpus"},
}


def write(folder: Path, changes: dict[str, Any] | None = None, **stages: Any) -> Path:
    """A run file with some changes."""
    body = {**RUN, **(changes or {})}
    body["stages"] = {**body["stages"], **stages}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_a_run_becomes_a_chain_of_commands(tmp_path: Path) -> None:
    chain = chain_of(read_runfile(write(tmp_path)), "slurm")
    jobs = {job.name: job for job in chain.jobs}
    assert list(jobs) == [
        "pack", "bpe", "dvae", "tokenize", "prior", "clip", "score", "evaluate", "report"
    ]  # fmt: skip
    assert jobs["tokenize"].after == ("bpe", "dvae") and jobs["tokenize"].array
    assert jobs["evaluate"].after == ("prior", "clip")
    assert jobs["score"].text.startswith("tapir score coco:/data/coco --out=/runs/shapes/scores")
    assert jobs["score"].array and jobs["report"].after == ("score", "evaluate")
    prior = jobs["prior"]
    assert prior.ranks == 2 and prior.world == 4 and prior.trains and prior.after == ("tokenize",)
    assert prior.text.startswith("tapir train prior tiny --data=/runs/shapes/data/tokens")
    assert "--compress.warm-start" in prior.command
    assert jobs["tokenize"].markers() == [f"tokenize-{i}.json" for i in range(4)]


def test_counting_and_overlap_are_arrays_and_score_takes_the_overlap(tmp_path: Path) -> None:
    coco = {"source": "coco:/data/coco", "workers": 3}
    stages = {"bpe": {"workers": 4}, "overlap": {**coco, "flags": {"threshold": 0.9}}}
    chain = chain_of(read_runfile(write(tmp_path, **stages)), "slurm")
    jobs = {job.name: job for job in chain.jobs}
    assert jobs["bpe"].array and jobs["overlap"].array and jobs["overlap"].after == ("clip",)
    assert jobs["bpe"].shards == "/runs/shapes/bpe"
    assert jobs["overlap"].text == (
        "tapir overlap /runs/shapes/data/raw coco:/data/coco --clip=/runs/shapes/clip "
        "--out=/runs/shapes/overlap --threshold=0.9"
    )
    assert jobs["score"].after == ("prior", "clip", "overlap")
    assert "--overlap=/runs/shapes/overlap/overlap.json" in jobs["score"].command
    stages["overlap"]["source"] = "cub:/data/cub"  # of another set: the score does not read it
    chain = chain_of(read_runfile(write(tmp_path, **stages)), "slurm")
    score = next(job for job in chain.jobs if job.name == "score")
    assert not any("--overlap=" in word for word in score.command)


def test_each_suite_is_a_job_beside_evaluate(tmp_path: Path) -> None:
    given = tmp_path / "warm.json"
    given.write_text(json.dumps({"suite": "shapes", "settings": {"temperature": 0.5}}))
    suites = ["geneval-style", str(given)]
    path = write(tmp_path, evaluate={"cpus": 2, "flags": {"suites": suites, "prompts": 9}})
    jobs = {job.name: job for job in chain_of(read_runfile(path), "slurm").jobs}
    assert list(jobs)[-4:] == ["evaluate", "suite-geneval-style", "suite-warm", "report"]
    assert jobs["report"].after == ("score", "evaluate", "suite-geneval-style", "suite-warm")
    models = " ".join(f"--{m}=/runs/shapes/{m}" for m in ("prior", "dvae", "clip", "bpe"))
    assert jobs["suite-geneval-style"].text == (
        "tapir evaluate --suite=geneval-style --out=/runs/shapes/suites/geneval-style " + models
    )
    assert jobs["suite-warm"].text == (
        f"tapir evaluate /runs/shapes/data/raw --suite={given} --out=/runs/shapes/suites/warm "
        + models
    )
    warm, evaluate = jobs["suite-warm"], jobs["evaluate"]
    assert warm.after == evaluate.after == ("prior", "clip") and warm.resources.cpus == 2
    assert "--prompts=9" in evaluate.command and "suite" not in evaluate.text


@pytest.mark.parametrize(
    ("suites", "reason"),
    [
        ("shape", "flags.suites: there is no suite 'shape'; did you mean 'shapes'"),
        (["shapes", "coco"], "coco reads coco:DIR; give it as the stage score"),
        (["shapes", "shapes"], "each name once"),
        ("panels", "panels reads a packed set of panels, and pack's source is shapes; leave it"),
        ("nowhere.json", "there is no nowhere.json"),
    ],
)
def test_wrong_suites_are_refused(suites: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, evaluate={"flags": {"suites": suites}})
    with pytest.raises(ConfigError, match=re.escape(reason)):
        chain_of(read_runfile(path), "slurm")


def test_a_file_without_prompts_reads_the_set_of_its_suite(tmp_path: Path) -> None:
    """One with prompts repeats them whatever the run packs."""
    given = tmp_path / "quick.json"
    given.write_text(json.dumps({"suite": "shapes"}))
    stages = {"pack": {"source": "panels"}, "evaluate": {"flags": {"suites": [str(given)]}}}
    with pytest.raises(ConfigError, match="shapes reads a packed set of shapes, and pack's source"):
        chain_of(read_runfile(write(tmp_path, **stages)), "local")
    prompts = [{"caption": f"a small {colour} circle"} for colour in ("red", "blue")]
    given.write_text(json.dumps({"suite": "shapes", "prompts": prompts}))
    jobs = chain_of(read_runfile(write(tmp_path, **stages)), "local").jobs
    assert "suite-quick" in [job.name for job in jobs]


def test_a_stage_that_is_left_out_is_not_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path)
    body = yaml.safe_load(path.read_text())
    del body["stages"]["tokenize"], body["stages"]["bpe"]
    path.write_text(yaml.safe_dump(body))
    jobs = {job.name: job for job in chain_of(read_runfile(path), "local").jobs}
    assert jobs["prior"].after == ("dvae",) and jobs["clip"].after == ("pack",)


def test_finished_jobs_are_not_sent_again(tmp_path: Path) -> None:
    chain = chain_of(read_runfile(write(tmp_path, {"out": str(tmp_path / "o")})), "local")
    submitted = Submitted(chain=chain, to="local", settings={}, ids={"pack": "7"})
    write_submitted(submitted)
    assert read_submitted(tmp_path / "o") == submitted
    markers = tmp_path / "o" / "markers"
    commands = {job.name: job.fingerprint for job in chain.jobs}
    for name in ("pack", "bpe", "tokenize-0"):
        facts = {"seconds": 1.0, "command": commands[name.split("-")[0]]}
        write_marker(str(markers), f"{name}.json", facts)
    left = {job.name: job.after for job in chain.without_done().jobs}
    assert "pack" not in left and left["dvae"] == () and left["tokenize"] == ("dvae",)
    other = chain_of(
        read_runfile(
            write(tmp_path, {"out": str(tmp_path / "o")}, bpe={"flags": {"vocabulary": 300}})
        ),
        "local",
    )
    with pytest.raises(InputError, match=r"stage bpe .* with other flags"):
        other.without_done()
    (markers / "pack.json").write_text("{}")
    with pytest.raises(CorruptError, match="damaged"):
        chain.without_done()


@pytest.mark.parametrize(
    ("changes", "stages", "message"),
    [
        ({}, {"piror": {}}, "did you mean 'prior'"),
        ({}, {"prior": {"nodse": 2}}, "did you mean 'nodes'"),
        ({}, {"prior": {"preset": "tinny"}}, "no preset 'tinny'"),
        ({}, {"prior": {"nodes": 3, "flags": {"mesh.data": 4}}}, "4 ranks .* 3 nodes"),
        (
            {},
            {"prior": {"flags": {"engine.gradient_accumulation_steps": 7}}},
            "steps=7 does not divide",
        ),
        ({}, {"pack": {}}, "give a source"),
        ({}, {"overlap": {}}, "stages.overlap: give a source, the evaluation set"),
        ({}, {"dvae": {"workers": 2}}, "workers are for pack, bpe, tokenize, overlap, score"),
        ({"name": ""}, {}, "name: missing"),
        ({"slurm": {"launcher": "ssh"}}, {}, "must be torchrun or srun"),
        ({"retires": 3}, {}, "did you mean 'retries'"),
        ({"retries": "many"}, {}, "retries='many' must be a whole number"),
        ({"stall_hours": 0}, {}, "stall_hours=0 must be a positive number of hours"),
        ({"name": "My run"}, {}, "must be lower-case letters"),
        ({"out": "s3://bucket/run"}, {}, "must be a folder"),
        ({"store": "gs://bucket"}, {}, "not a store that Tapir reads"),
        ({"slurm": 5}, {}, "slurm: expected a mapping"),
        ({"slurm": {"partition": "a b"}}, {}, "must not have spaces"),
        ({"environment": "HOME"}, {}, "environment='HOME' must be a list of texts"),
        ({"environment": ["A,B=1"]}, {}, "'A,B=1' is not the name of a variable"),
        (
            {"slurm": {"extra": ["--a\nb"]}},
            {},
            "slurm.extra: .* must begin with -- and be one line",
        ),
        ({"out": "/runs/a\nb"}, {}, "must be without line breaks"),
        ({}, {"bpe": {"spares": 1}}, "stages.bpe: spares are for stages of several nodes"),
        ({}, {"tokenize": {"workers": 4, "spares": 1}}, "stages.tokenize: spares are for stages"),
        ({}, {"prior": {"nodes": 2, "spares": -1, "flags": {"mesh.data": 4}}}, "not be negative"),
        ({"to": "mars"}, {}, "to='mars' must be local or slurm or kubernetes"),
        ({}, {"prior": {"minutes": "1:00:00"}}, "stages.prior.minutes='1:00:00' must be"),
        ({}, {"prior": {"memory": "lots"}}, "must be like 64G"),
        ({}, {"prior": {"flags": {"out": "/x"}}}, "out is the run's to set"),
        ({}, {"dvae": {"flags": [1]}}, "expected a mapping"),
        ({}, {"pack": {"source": "shapes", "nodes": 2}}, "nodes are for training"),
    ],
)
def test_a_wrong_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], stages: dict[str, Any], message: str
) -> None:
    with pytest.raises(TapirError, match=message) as caught:
        chain_of(read_runfile(write(tmp_path, changes, **stages)), "local")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        (
            {"prior": {"flags": {"loop.stepz": 3}}},
            "stages.prior.flags.loop.stepz: unknown; did you mean 'loop.steps'?",
        ),
        (
            {"prior": {"flags": {"loop.batsh": 3}}},
            "stages.prior.flags.loop.batsh: unknown; did you mean 'loop.global_batch_size'?",
        ),
        (
            {"evaluate": {"flags": {"guidid": 3}}},
            "stages.evaluate.flags.guidid: unknown; did you mean 'guidance_prompts'?",
        ),
        (
            {"prior": {"flags": {"no_checkpoint.background": True}}},
            "stages.prior.flags.no_checkpoint.background: unknown; did you mean "
            "'checkpoint.async_save: false'?",
        ),
        (
            {"prior": {"flags": {"checkpoint.async_save": "off"}}},
            "stages.prior.flags.checkpoint.async_save='off' must be true or false",
        ),
        (
            {"prior": {"flags": {"loop.steps": "many"}}},
            "stages.prior.flags.loop.steps='many' must be a whole number",
        ),
        (
            {"prior": {"flags": {"loop.steps": [3, 4]}}},
            "stages.prior.flags.loop.steps=[3, 4] must be a whole number",
        ),
        (
            {"evaluate": {"flags": {"guidance_scales": [1, "x"]}}},
            "stages.evaluate.flags.guidance_scales=[1, 'x'] must be a list of numbers",
        ),
        (
            {"evaluate": {"flags": {"guidance_scales": [[1], 2]}}},
            "stages.evaluate.flags.guidance_scales: [[1], 2] must be a text, a number, true or "
            "false, or a list of them",
        ),
        (
            {"tokenize": {"at_onec": 2}},
            "stages.tokenize: unknown 'at_onec'; did you mean 'parallelism'?",
        ),
        (
            {"clipp": {}, "bpe": {"worker": 2, "cpus": "many"}},
            "\n- stages: unknown 'clipp'; did you mean 'clip'?\n- stages.bpe: unknown 'worker'; "
            "did you mean 'workers'?\n- stages.bpe.cpus='many' must be a whole number",
        ),
        (
            {"prior": {"flags": {"xyzzy": 1}}},
            "stages.prior.flags.xyzzy: unknown; `tapir train prior tiny --help` lists the flags",
        ),
        (
            {"pack": {"source": "shapes", "flags": {"count": "x"}}, "bpe": {"flags": {"q": 1}}},
            "\n- stages.pack.flags.count='x' must be a whole number\n- stages.bpe.flags.q: unknown;"
            " `tapir train bpe tiny --help` lists the flags",
        ),
    ],
)
def test_submit_names_the_file_the_stage_and_the_flag(
    tmp_path: Path, stages: dict[str, Any], problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, **stages)
    with pytest.raises(ConfigError) as raised:
        submit([str(path), "--dry-run"])
    gap = "" if problem.startswith("\n") else " "
    assert str(raised.value) == f"{path}:{gap}{problem}"
    assert capfd.readouterr() == ("", "")


def test_a_list_becomes_the_values_of_its_flag(tmp_path: Path) -> None:
    lists = {"guidance_scales": [1, 2.5], "prompts": 8}
    path = write(
        tmp_path, evaluate={"flags": lists}, score={"source": "coco:x", "flags": {"radii": [0]}}
    )
    run = read_runfile(path)
    jobs = {job.name: job.command for job in chain_of(run, "local").jobs}
    assert jobs["evaluate"][-4:] == ("--guidance-scales", "1", "2.5", "--prompts=8")
    assert jobs["score"][-2:] == ("--radii", "0")
    settings = settings_of_stages(run)
    assert settings["evaluate"].guidance_scales == (1.0, 2.5)
    assert settings["score"].radii == (0.0,)
    text = tapir("submit", str(path), "--to=slurm", "--dry-run")
    assert "--guidance-scales 1 2.5 --prompts=8" in text


def test_a_stage_that_stops_early_is_told(tmp_path: Path) -> None:
    stops = {"flags": {"loop.steps": 6, "loop.stop_at": 3, "mesh.data": 1}}
    path = write(tmp_path, dvae=stops, prior={"flags": {"loop.steps": 9, "loop.stop_at": 9}})
    text = " ".join(tapir("submit", str(path), "--dry-run").split())
    whole = read_runfile(path)
    notices = unfinished_inputs(whole, settings_of_stages(whole))
    assert len(notices) == 1 and f"{path}: {notices[0]}" in text and text.count("stop_at=") == 1
    assert notices[0].startswith(
        "stages.dvae.flags.loop.stop_at=3 is below loop.steps=6: a dVAE stays unfinished, and "
        "tokenize, score and evaluate read its last checkpoint"
    )
    alone = replace(whole, stages={"dvae": whole.stages["dvae"]})
    assert unfinished_inputs(alone, settings_of_stages(alone)) == []


@pytest.mark.parametrize(
    ("stop_at", "change", "notice"),
    [
        (6, "loop.steps=12", ["stages.dvae.flags.loop.stop_at=6 is below loop.steps=12: a dVAE"]),
        (3, "loop.stop_at=0", []),
    ],
)
def test_settings_that_a_resume_changes_count(
    tmp_path: Path, stop_at: int, change: str, notice: list[str]
) -> None:
    flags = {"loop.steps": 6, "loop.stop_at": stop_at, "mesh.data": 1}
    dvae = {"flags": {**flags, "resume_with": f"{change},mesh.data=2"}}
    run = read_runfile(write(tmp_path, dvae=dvae, prior={}))
    notices = unfinished_inputs(run, settings_of_stages(run))
    assert [text[: len(start)] for text, start in zip(notices, notice, strict=True)] == notice
    jobs = {job.name: job for job in chain_of(run, "local").jobs}
    assert jobs["dvae"].ranks == 2 and f"--resume-with={change},mesh.data=2" in jobs["dvae"].command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.lrr=1", "stages.dvae: resume_with: there is no setting 'optim.lrr'; did you mean"),
        ("loop.stop_at=9", "stages.dvae: loop.stop_at=9 must be 0 .* to 6"),
    ],
)
def test_wrong_changes_of_a_resume_are_refused(tmp_path: Path, change: str, message: str) -> None:
    run = read_runfile(
        write(tmp_path, dvae={"flags": {"loop.steps": 6, "resume_with": change}}, prior={})
    )
    with pytest.raises(ConfigError, match=message):
        chain_of(run, "local")


def test_wrong_files_and_flags_end_with_2(tmp_path: Path) -> None:
    assert "no run file" in tapir("submit", str(tmp_path / "no.yaml"), code=2)
    (tmp_path / "list.yaml").write_text("[1")
    assert "cannot be read" in tapir("submit", str(tmp_path / "list.yaml"), code=2)
    path = write(tmp_path, {"out": str(tmp_path / "o")}, prior={"flags": {"loop.stepz": 3}})
    assert "loop.steps" in tapir("submit", str(path), "--dry-run", code=2)
    path = write(tmp_path, {"environment": ["NOT_THERE"], "out": str(tmp_path / "o")})
    assert "NOT_THERE is not set" in tapir("submit", str(path), "--dry-run", code=2)
    assert "chain.json" in tapir("logs", str(tmp_path), code=2)
    assert not (tmp_path / "o").exists()


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    """YAML takes the last one; a key that only overrides a merged one is fine."""
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nout: o\nstages:\n  bpe: {}\n  dvae: {}\n  bpe: {}\n")
    with pytest.raises(InputError, match=r"'bpe' is given twice\n.*line 6"):
        read_runfile(path)
    path.write_text("name: a\nout: o\nstages:\n  bpe: &b {cpus: 2}\n  dvae: {<<: *b, cpus: 3}\n")
    stages = read_runfile(path).stages
    assert (stages["bpe"].resources.cpus, stages["dvae"].resources.cpus) == (2, 3)


def test_the_examples_are_whole(tmp_path: Path) -> None:
    text = tapir("submit", str(ROOT / "examples" / "paper.py"), "--to=slurm", "--dry-run")
    assert "#SBATCH --nodes=128" in text and "--nproc-per-node=8" in text
    assert "#SBATCH --array=0-255%128" in text and "--signal=B:USR1@600" in text
    for to, workers in (("slurm", "#SBATCH --array=0-63"), ("kubernetes", "completions: 64")):
        laion = tapir("submit", str(ROOT / "examples" / "laion.yaml"), f"--to={to}", "--dry-run")
        assert workers in laion and "--in-place" in laion
    panels = tapir("submit", str(ROOT / "examples" / "panels.yaml"), "--dry-run")
    assert "--suite=panels" in panels and "--model.pixels" in panels
    shapes = tapir("submit", str(ROOT / "examples" / "shapes.yaml"), "--to=slurm", "--dry-run")
    script = tmp_path / "submit.sh"
    script.write_text(shapes)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    line = next(line for line in text.splitlines() if line.startswith("export MASTER_PORT="))
    ports = {
        count: subprocess.check_output(
            ["bash", "-c", f"{line}; echo $MASTER_PORT"],
            env={"SLURM_JOB_ID": "41000", **({"SLURM_RESTART_COUNT": count} if count else {})},
            text=True,
        ).strip()
        for count in ("", "1", "30")
    }
    assert ports == {"": "25000", "1": "25997", "30": "30910"}, "another one after each restart"


def test_spares_reach_the_script_and_other_places_ignore_them(tmp_path: Path) -> None:
    stage = {"nodes": 2, "spares": 2, "flags": {"mesh.data": 4}}
    path = write(tmp_path, {"out": str(tmp_path / "50% off")}, prior=stage)
    text = tapir("submit", str(path), "--to=slurm", "--dry-run")
    assert "#SBATCH --nodes=2-4\n#SBATCH --no-kill\n" in text
    assert f'#SBATCH --output="{tmp_path}/50%% off/logs/prior.log"' in text
    assert "no-kill" not in tapir("submit", str(path), "--to=local", "--dry-run")
    assert "backslash" in tapir(
        "submit", str(write(tmp_path, {"out": "a\\b"})), "--to=slurm", "--dry-run", code=2
    )


def test_secrets_are_handed_over_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    secret = {"AWS_SECRET_ACCESS_KEY": "s3cr3t-value", "AWS_ACCESS_KEY_ID": "id-value"}
    for place in ("slurm", "kubernetes", "local"):
        text = tapir("submit", str(path), f"--to={place}", "--dry-run", **secret)
        assert "s3cr3t-value" not in text and "id-value" not in text
    run = read_runfile(path)
    command = sbatch_command(chain_of(run, "slurm"), chain_of(run, "slurm").jobs[0], {})
    assert all("=" not in name for name in command[2].removeprefix("--export=").split(","))


def test_a_wait_ends_with_the_reason_why_a_job_gave_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain = chain_of(read_runfile(write(tmp_path, {"out": str(tmp_path / "o")})), "local")
    chain = replace(chain, jobs=chain.jobs[:2])
    texts = {
        "pack": "one\ntwo\njob pack ended\n",
        "bpe": "one\njob bpe gives up: 4 failures; last error: x. Mend it\njob bpe ended\ntwo\n",
    }
    (chain.out / "jobs").mkdir(parents=True)
    for job, text in texts.items():
        log = chain.out / "logs" / f"{job}.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(text)
    states = {"pack": "failed (exit code 1)", "bpe": "failed (exit code 70)"}
    (chain.out / "jobs" / "local.json").write_text(json.dumps({"pid": 0, "states": states}))
    with pytest.raises(SystemExit):
        wait_for(Submitted(chain=chain, to="local", settings={}, ids={}))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert lines[0].startswith("pack: two (full log: ")
    assert lines[1].startswith("bpe: job bpe gives up: 4 failures; last error: x. Mend it (full")


def test_jobs_know_where_their_progress_shows(tmp_path: Path) -> None:
    changes = {"store": "s3://bucket/shapes", "retries": 5, "stall_hours": 7.5}
    clip = {"flags": {"mesh.data": 1, "checkpoint.to": "s3://bucket/clip"}}
    chain = chain_of(read_runfile(write(tmp_path, changes, clip=clip)), "slurm")
    jobs = {job.name: job for job in chain.jobs}
    assert {name: job.checkpoints for name, job in jobs.items() if job.checkpoints} == {
        "dvae": "/runs/shapes/dvae/checkpoints",
        "prior": "/runs/shapes/prior/checkpoints",
        "clip": "s3://bucket/clip",
    }
    assert {name: job.shards for name, job in jobs.items() if job.shards} == {
        "pack": "s3://bucket/shapes/raw",
        "bpe": "/runs/shapes/bpe",
        "tokenize": "s3://bucket/shapes/tokens",
        "score": "/runs/shapes/scores",
    }
    words = chain.wrapped(jobs["prior"], "prior", ["true"])
    assert {"--retries=5", "--stall-hours=7.5"} < set(words)
    assert "--checkpoints=/runs/shapes/prior/checkpoints" in words
    assert "--shards=s3://bucket/shapes/raw" in chain.wrapped(jobs["pack"], "pack", ["true"])
    assert not any(
        "checkpoints" in w or "shards" in w for w in chain.wrapped(jobs["evaluate"], "evaluate", [])
    )


def test_kubernetes_needs_a_claim(tmp_path: Path) -> None:
    path = write(tmp_path, {"kubernetes": {}})
    text = tapir("submit", str(path), "--to=kubernetes", "--dry-run", code=2)
    assert "kubernetes.claim must name a PersistentVolumeClaim" in text
