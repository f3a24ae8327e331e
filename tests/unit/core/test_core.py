"""Keys, files, settings and the behaviour of the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.config import from_json, to_json
from core.errors import ConfigError, CorruptError
from core.files.atomic import remove_leftovers, seal, unseal, write_atomic
from core.keys import key_fraction, key_int, keyed_rng
from core.memory import host_memory
from parallel.config import MeshConfig
from tests.harness import ENVIRONMENT, tapir
from training.config import PriorTrain
from training.presets import prior_tiny


def test_keys_depend_on_every_part_and_type() -> None:
    keys = {key_int(0, 1, "a"), key_int(1, 0, "a"), key_int(0, 1, "b"), key_int("0", 1, "a")}
    assert len(keys) == 4
    assert keyed_rng(3, "x").random() == keyed_rng(3, "x").random()
    assert 0 <= key_fraction("a") < 1


def test_sealed_json_refuses_every_flipped_bit() -> None:
    data = seal({"a": 1, "b": ["x", 2.5]})
    assert unseal(data, "here") == {"a": 1, "b": ["x", 2.5]}
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(CorruptError, match="here"):
            unseal(bytes(damaged), "here")


def test_atomic_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b", b"one")
    (tmp_path / "a" / ".tmp-dead-b").write_bytes(b"half")
    assert remove_leftovers(tmp_path) == 1
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_settings_survive_json() -> None:
    settings = prior_tiny()
    assert from_json(PriorTrain, to_json(settings)) == settings
    with pytest.raises(ConfigError, match="did you mean 'loop'"):
        from_json(PriorTrain, {"lop": {}})


def test_problems_come_all_at_once_with_a_fix() -> None:
    problems = MeshConfig(data=2, tensor=2).problems(world=3)
    assert len(problems) == 2
    assert "needs 4 ranks, but 3" in problems[1]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "prio"], "did you mean 'prior'"),
        (["train", "prior", "tinny"], "did you mean 'tiny'"),
        (["train", "prior", "tiny", "--loop.stesp", "3"], "--loop.steps"),
        (["pack", "shapes", "/tmp/tapir-test-never-written", "--cuont", "3"], "--count"),
        (["pack", "no-such-source", "/tmp/tapir-test-never-written"], "no source 'no-such-source'"),
        (["tokenize", "a", "b", "--worker", "4/4"], "i/n"),
        (["train", "prior", "tiny", "--mesh.data", "3"], "do not divide order.lanes=8"),
        (["train", "prior", "tiny", "--data", "/nowhere"], "tapir tokenize"),
        (["sample"], "caption"),
        (["train", "prior", "tiny", "--order.lanes=0"], "must be at least 1"),
        (["train", "prior", "tiny", "--optim.lr=nan"], "must be positive numbers"),
        (["train", "prior", "tiny", "--model.dim=0"], "must be at least 1"),
        (["train", "bpe", "tiny", "--out=/proc/nothing", "--data=/nowhere"], "no data set"),
        (["demo", "--out=/etc/hosts", "--size=mini"], "is a file, and"),
    ],
)
def test_wrong_command_lines_are_answered(arguments: list[str], expected: str) -> None:
    assert expected in tapir(*arguments, code=2)


@pytest.mark.seconds
def test_wrong_environments_are_answered(tmp_path: Path) -> None:
    flags = ["pack", "shapes", "s3://bucket/x"]
    assert "http://host:port" in tapir(*flags, code=2, AWS_ENDPOINT_URL="127.0.0.1:9")
    wrong = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for endpoint in ("http://127.0.0.1:99999", "http://127.0.0.1:9"):
        text = tapir(*flags, code=2, AWS_ENDPOINT_URL=endpoint, **wrong)
        assert "check AWS_ENDPOINT_URL" in text
    assert "number of ranks" in tapir("train", "prior", "tiny", code=2, WORLD_SIZE="abc")
    (tmp_path / "tokenizer.json").write_text("garbage")
    data = f"--data={tmp_path}"
    assert "no data set" in tapir("train", "clip", "tiny", data, f"--bpe={tmp_path}", code=2)


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_sleep_soon_unless_told_otherwise(given: dict[str, str], seen: str) -> None:
    code = (
        "import atexit, os, sys; sys.argv = ['tapir', '--help']; import tapir;"
        "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'))); tapir.main()"
    )
    plain = {k: v for k, v in ENVIRONMENT.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**plain, **given}, capture_output=True, check=True)
    assert done.stdout.decode().split()[-1] == seen


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_replaced_by_the_null_device(closed: str) -> None:
    command = f"{sys.executable} -P -m tapir --help {closed}"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_under_standard_output_is_named() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-P", "-m", "tapir", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr == b"tapir: cannot write to standard output: No space left on device\n"


@pytest.mark.seconds
@pytest.mark.parametrize("arguments", [["--help"], ["tokenize", "--help"]])
def test_a_closed_pipe_ends_a_command_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-P", "-m", "tapir", *arguments]
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (1, b"")


def test_mesh_must_match_the_ranks_that_were_started() -> None:
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    text = tapir("train", "prior", "tiny", code=2, WORLD_SIZE="4", RANK="0", **meet)
    assert "needs 2 ranks, but 4 were started; try --mesh.data 4" in text


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup_limit_counts_and_droppable_page_cache_is_free(
    version: int, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 5000 kB\n")
    assert host_memory(tmp_path) == (5_120_000, 8_192_000)
    names = {1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"), 2: ""}
    limit, used, prefix = names[version] or ("memory.max", "memory.current", "")
    group = tmp_path / "sys/fs/cgroup"
    (group / limit).parent.mkdir(parents=True)
    (group / limit).write_text("3000000\n")
    (group / used).write_text("1800000\n")
    (group / used).with_name("memory.stat").write_text(f"anon 5\n{prefix}inactive_file 800000\n")
    assert host_memory(tmp_path) == (2_000_000, 3_000_000)
    (group / limit).write_text("max\n")
    assert host_memory(tmp_path) == (5_120_000, 8_192_000)
    free, whole = host_memory()
    assert 0 < free < whole


def test_paths_that_are_no_utf8_are_kept_in_json() -> None:
    value = {"out": os.fsdecode(b"/tmp/caf\xe9"), "text": "caf\u00e9 \U0001f98a"}
    assert unseal(seal(value), "x") == value
    assert os.fsencode(json.loads(seal(value))["out"]) == b"/tmp/caf\xe9"


@pytest.mark.seconds
@pytest.mark.parametrize("extra", [{"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_captions_and_paths_are_utf8_in_every_locale(extra: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / 'caf\u00e9 \'a\n"b" %s {}'
    folder.mkdir()
    (folder / "t.txt").write_text("ein roter F\u00e4cher \u7ea2\n" * 3, encoding="utf-8")
    flags = ["--vocabulary=270", f"--texts={folder / 't.txt'}", f"--out={folder / '-x'}"]
    assert "captions ->" in tapir("train", "bpe", "tiny", *flags, **extra)
    assert (folder / "-x" / "tokenizer.json").is_file()


def test_a_current_folder_that_was_deleted_is_named(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]);"
        "os.execv(sys.executable, [sys.executable, '-P', '-m', 'tapir', 'plan', 'tiny'])"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    command = [sys.executable, "-c", code, str(gone)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "current folder was deleted" in done.stderr
