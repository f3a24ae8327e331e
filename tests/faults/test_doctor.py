"""`tapir doctor` names each planted fault, its place and its fix; a sound machine has none.

The faults are real: small and read-only mounts, namespaces, limits, a store that refuses.
"""

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest

from bench.support.machines import two_machines
from cluster.object_server import ObjectServer
from core.launch_environment import free_port
from tests.faults.conftest import Record
from tests.harness import ENVIRONMENT, PATIENCE, TAPIR

pytestmark = pytest.mark.seconds

HOST = socket.gethostname()
NODE = (*TAPIR, "doctor", "--node", "--json")
QUICK = (*TAPIR, "doctor", "--quick", "--json")
Rows = list[dict[str, Any]]

SKEWED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += atoi(getenv("SKEW"));
    return failed;
}
"""

SLOWED = """
import importlib, signal, sys, time
import tapir
checks = importlib.import_module("parallel.diagnostics.checks")
matmuls = checks._matmuls
def slowed(*arguments):
    signal.signal(signal.SIGPROF, lambda *_: time.sleep(1))
    signal.setitimer(signal.ITIMER_PROF, 0.01, 0.01)
    rate = matmuls(*arguments)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return rate
checks._matmuls = slowed
tapir.main()
"""
"""A rank that sleeps a second after each 0.01 s of work, in its matmuls."""


def run(
    command: Sequence[str], code: int | None, limit: Callable[[], None] | None = None, **extra: str
) -> Rows:
    """The rows of a doctor; asserts its exit code, unless None is given."""
    environment = {**ENVIRONMENT, **extra}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=PATIENCE
    )
    assert code in (None, done.returncode), done.stdout + done.stderr
    rows: Rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    return rows


def run_ranks(
    commands: Sequence[Sequence[str]],
    codes: Sequence[int],
    address: str = "127.0.0.1",
    port: int | None = None,
    extra: Sequence[dict[str, str]] = ({}, {}),
) -> list[Rows]:
    """The rows of each rank, started as by a launcher on machines of one rank each."""
    started = []
    world = {"MASTER_ADDR": address, "MASTER_PORT": str(port or free_port())}
    for rank, (command, more) in enumerate(zip(commands, extra, strict=True)):
        own = {"RANK": str(rank), "WORLD_SIZE": str(len(commands)), "LOCAL_RANK": "0"}
        environment = {**ENVIRONMENT, **world, **own, **more}
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, env=environment, **both))
    reports = []
    for process, code in zip(started, codes, strict=True):
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, output + errors
        reports.append(json.loads(output.splitlines()[-1])["rows"] if output else [])
    return reports


def mounted(script: str, command: Sequence[str]) -> list[str]:
    """A command in its own mount namespace, after a script that mounts."""
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    return [*inside, f'{script}\nexec "$@"', "sh", *command]


def assert_named(rows: Rows, check: str, text: str, mend: str, **place: Any) -> str:
    """Assert that only this check fails, with this place and fix; returns it as one line."""
    wrong = [row for row in rows if row["status"] == "bad"]
    assert {row["check"] for row in wrong} == {check}, wrong
    row = wrong[0]
    assert text in row["observed"], wrong
    assert mend in row["fix"], row
    assert {name: row[name] for name in place} == place, row
    assert row["host"]
    return f"{row['host']}: {row['observed'][:70]}"


def test_a_sound_machine_has_no_bad_row(tmp_path: Path, s3: ObjectServer) -> None:
    flags = [f"--out={tmp_path / 'run'}", "--data=s3://tapir-tests/doctor"]
    rows = run([*NODE, *flags], 0, **s3.environment)
    assert {"store rights", "store speed", "clock", "packages", "host name"} <= {
        row["check"] for row in rows
    }
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "need", "text"),
    [("8m", "0", "No space left on device"), ("64m", "1", "GB are free; 1 are needed")],
)
def test_a_full_disk(tmp_path: Path, fault: Record, size: str, need: str, text: str) -> None:
    fault(40, f"doctor: a run folder of {size}")
    disk = f"mount -t tmpfs -o size={size} tmpfs {tmp_path}"
    rows = run(mounted(disk, [*NODE, f"--out={tmp_path}", f"--disk={need}"]), 1)
    fault.outcome(assert_named(rows, "run folder", text, "another --out", host=HOST))


def test_a_full_temporary_folder(tmp_path: Path, fault: Record) -> None:
    fault(40, "doctor: a temporary folder of 8 MB")
    disk = f"mount -t tmpfs -o size=8m tmpfs {tmp_path}"
    rows = run(mounted(disk, NODE), 1, TMPDIR=str(tmp_path))
    fault.outcome(assert_named(rows, "temporary folder", "0.25 are needed", "export TMPDIR"))


def test_a_read_only_run_folder(tmp_path: Path, fault: Record) -> None:
    fault(40, "doctor: a read-only run folder")
    lock = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,ro,bind {tmp_path}"
    rows = run(mounted(lock, [*NODE, f"--out={tmp_path}"]), 1)
    fault.outcome(assert_named(rows, "run folder", "Read-only", "mount it for writing"))


def test_a_container_with_little_shared_memory(fault: Record) -> None:
    fault(40, "doctor: /dev/shm of 64 MB")
    rows = run(mounted("mount -t tmpfs -o size=64m tmpfs /dev/shm", NODE), 1)
    fault.outcome(assert_named(rows, "shared memory", "0.07 of 0.07 GB of /dev/shm", "--shm-size"))


def test_too_few_open_files(fault: Record) -> None:
    fault(40, "doctor: 256 open files")
    rows = run(NODE, 1, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    fault.outcome(assert_named(rows, "open files", "256 open files", "ulimit -n"))


def test_too_little_locked_memory(fault: Record) -> None:
    fault(40, "doctor: 64 kB of locked memory")
    rows = run(NODE, 0, lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (65_536, 65_536)))
    row = next(row for row in rows if row["check"] == "locked memory")
    assert row["status"] == "warning" and "ulimit -l unlimited" in row["fix"]
    fault.outcome(row["observed"])


def test_more_memory_or_gpus_than_there_are(fault: Record) -> None:
    fault(40, "doctor: a run of 9 PB")
    rows = run([*NODE, "--memory=9e6"], 1)
    fault.outcome(assert_named(rows, "memory", "9e+06 are needed", "another node"))
    rows = run([*NODE, "--gpus=64"], 1)
    assert_named(rows, "gpus", "64 are needed", "--gres=gpu:N")


def test_a_wrong_torch(tmp_path: Path, fault: Record) -> None:
    fault(40, "doctor: another torch first on the path")
    older = tmp_path / "torch-2.1.0.dist-info"
    older.mkdir()
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    path = f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"
    rows = run(NODE, 1, PYTHONPATH=path)
    fault.outcome(
        assert_named(rows, "packages", f"torch 2.1.0 is installed in {tmp_path}", "'torch>=2.6")
    )


@pytest.mark.world
def test_versions_that_are_not_those_that_run(tmp_path: Path, fault: Record) -> None:
    fault(40, "doctor: a newer deepspeed and a second torch")
    for name, version in (("torch", "2.12.0"), ("deepspeed", "0.20.0")):
        other = tmp_path / f"{name}-{version}.dist-info"
        other.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (other / "METADATA").write_text(text)
    path = f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"
    rows = run([*TAPIR, "doctor", "--json", "--seconds=0.1"], 1, PYTHONPATH=path)
    wrong = {row["check"]: row for row in rows if row["status"] == "bad"}
    assert set(wrong) == {"torch", "deepspeed"}
    assert "2.12.0 is what is installed first" in wrong["torch"]["observed"]
    assert "pip install deepspeed==" in wrong["deepspeed"]["fix"]
    fault.outcome(wrong["torch"]["observed"])


def test_a_missing_package(tmp_path: Path, fault: Record) -> None:
    fault(40, "doctor: no webdataset")
    site = Path(boto3.__file__).parents[1]
    without = (
        f"mount -t tmpfs tmpfs {tmp_path}; mkdir {tmp_path}/upper {tmp_path}/work\n"
        f"mount -t overlay -o lowerdir={site},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
        f" overlay {site}\nrm -r {site}/webdataset*"
    )
    rows = run(mounted(without, NODE), 1)
    text = assert_named(
        rows, "packages", "webdataset is not installed", "pip install 'webdataset>="
    )
    assert list(site.glob("webdataset-*"))
    fault.outcome(text)


def test_a_host_name_that_does_not_resolve(fault: Record) -> None:
    fault(40, "doctor: an unknown host name")
    rename = ["unshare", "--uts", "--net", "sh", "-c", 'hostname lost-node; exec "$@"', "sh"]
    rows = run([*rename, *NODE], 1)
    text = assert_named(
        rows, "host name", "lost-node does not resolve", "/etc/hosts", host="lost-node"
    )
    rows = run([*rename, *NODE], 0, GLOO_SOCKET_IFNAME="eth0")
    fault.outcome(text)


def test_no_store(fault: Record) -> None:
    fault(40, "doctor: no S3 server")
    nobody = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port('127.0.0.1')}"}
    keys = {"AWS_ACCESS_KEY_ID": "wrongkey", "AWS_SECRET_ACCESS_KEY": "wrongsecret"}
    rows = run([*NODE, "--data=s3://bucket/raw"], 1, **nobody, **keys)
    fault.outcome(assert_named(rows, "store", "nothing answers", "AWS_ENDPOINT_URL"))


def test_a_wrong_key(s3: ObjectServer, fault: Record) -> None:
    fault(40, "doctor: a wrong S3 key")
    wrong = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrongsecretvalue"}
    rows = run([*NODE, "--data=s3://tapir-tests/raw"], 1, **wrong)
    assert "wrongsecretvalue" not in json.dumps(rows)
    assert s3.environment["AWS_ACCESS_KEY_ID"] not in json.dumps(rows)
    fault.outcome(assert_named(rows, "store", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"))


def test_a_missing_right(s3: ObjectServer, fault: Record) -> None:
    fault(40, "doctor: a bucket that may only be read")
    with s3.credentials():
        client = boto3.client("s3")
        client.create_bucket(Bucket="only-read")
        deny = {"Effect": "Deny", "Principal": "*", "Action": ["s3:PutObject"]}
        deny["Resource"] = ["arn:aws:s3:::only-read/*"]
        policy = {"Version": "2012-10-17", "Statement": [deny]}
        client.put_bucket_policy(Bucket="only-read", Policy=json.dumps(policy))
    command = [*NODE, "--data=s3://only-read/raw"]
    rows = run(command, 1, **s3.environment)
    text = "may list, read; may not write (AccessDenied)"
    fault.outcome(assert_named(rows, "store rights", text, "bucket policy"))
    run([*command, "--rights=read"], 0, **s3.environment)


@pytest.fixture(scope="session")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose wall clock is two minutes ahead, as a process sees it."""
    folder = tmp_path_factory.mktemp("skew")
    (folder / "skew.c").write_text(SKEWED)
    library = folder / "skew.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "skew.c"), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library), "SKEW": "120"}


def test_a_clock_that_the_store_disagrees_with(
    s3: ObjectServer, skewed: dict[str, str], fault: Record
) -> None:
    fault(40, "doctor: a clock two minutes ahead of the store's")
    rows = run([*NODE, "--data=s3://tapir-tests/clock"], 1, **s3.environment, **skewed)
    fault.outcome(
        assert_named(rows, "clock", "s ahead of the store's", "chronyc makestep", host=HOST)
    )


def test_a_clock_that_other_ranks_disagree_with(skewed: dict[str, str], fault: Record) -> None:
    fault(40, "doctor: a rank's clock is two minutes ahead")
    rows, _ = run_ranks([QUICK, QUICK], [1, 0], extra=[{}, skewed])
    text = assert_named(rows, "clock", "s ahead of rank 0's", "chronyc makestep", rank=1)
    assert abs(float(text.split()[4]) - 120) < 5
    fault.outcome(text)


def test_a_blocked_port(fault: Record) -> None:
    fault(40, "doctor: packets of the rendezvous port are dropped")
    port = free_port()
    with two_machines() as machines:
        inside = [["ip", "netns", "exec", name] for name in machines.names]
        rule = ["ip", "rule", "add", "sport", str(port), "ipproto", "tcp", "type", "blackhole"]
        subprocess.run([*inside[0], *rule], check=True)
        commands = [[*each, *QUICK, "--wait=2"] for each in inside]
        first, second = run_ranks(commands, [1, 1], machines.addresses[0], port)
    assert_named(
        first, "rendezvous", f"1 did not come to 10.231.7.1:{port}", f"TCP port {port}", rank=0
    )
    text = "packets are dropped (its node answers at another port)"
    fault.outcome(assert_named(second, "rendezvous", text, f"open TCP port {port}", rank=1))


def test_a_port_that_is_taken(fault: Record) -> None:
    fault(40, "doctor: another program holds the rendezvous port")
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        commands = [[*QUICK, "--wait=1"]] * 2
        first, second = run_ranks(commands, [1, 1], port=port)
    fault.outcome(assert_named(first, "rendezvous", "cannot listen", "MASTER_PORT", rank=0))
    assert_named(second, "rendezvous", "is not rank 0", "another program", rank=1)


def test_ranks_that_do_not_share_the_run_folder(tmp_path: Path, fault: Record) -> None:
    fault(40, "doctor: rank 1 has another disk at the run folder's path")
    command = [*QUICK, f"--out={tmp_path}"]
    other = mounted(f"mount -t tmpfs -o size=2g tmpfs {tmp_path}", command)
    rows, _ = run_ranks([command, other], [1, 0])
    assert not list(tmp_path.iterdir())
    broken = mounted(f"mount -t tmpfs -o size=2m tmpfs {tmp_path}", command)
    both, _ = run_ranks([command, broken], [1, 0])
    assert_named(both, "run folder", "1 are needed", "another --out", rank=1)
    text = assert_named(rows, "shared run folder", str(tmp_path), "mount the same", rank=1)
    fault.outcome(text)


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_a_scheduler_that_does_not_answer(tmp_path: Path, fault: Record, kind: str) -> None:
    fault(40, f"doctor: {kind} is silent")
    (tmp_path / "slurm.conf").write_text(
        f"ClusterName=x\nSlurmctldHost=x(127.0.0.1)\nSlurmctldPort={free_port('127.0.0.1')}\n"
        "AuthType=auth/none\nMessageTimeout=2\nNodeName=n1\nPartitionName=p Nodes=n1\n"
    )
    kubernetes = {"clusters": [{"name": "x", "cluster": {}}], "current-context": "x"}
    kubernetes["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{free_port('127.0.0.1')}"}
    kubernetes["contexts"] = [{"name": "x", "context": {"cluster": "x", "user": ""}}]
    (tmp_path / "config").write_text(json.dumps(kubernetes))
    paths = {"SLURM_CONF": str(tmp_path / "slurm.conf"), "KUBECONFIG": str(tmp_path / "config")}
    rows = run([*NODE, f"--scheduler={kind}"], 1, **paths)
    there = shutil.which({"slurm": "sinfo", "kubernetes": "kubectl"}[kind])
    text, mend = ("does not answer", "") if there else ("not found", "install")
    fault.outcome(assert_named(rows, "scheduler", text, mend, host=HOST))


@pytest.mark.world
def test_a_slow_rank(fault: Record) -> None:
    fault(40, "doctor: a rank sleeps most of its time")
    flags = ["doctor", "--json", "--seconds=0.3"]
    slow = [sys.executable, "-c", SLOWED, *flags]
    rows, _ = run_ranks([[*TAPIR, *flags], slow], [1, 0])
    fault.outcome(assert_named(rows, "matmul", "% of the median of 2 ranks", "CPU binding", rank=1))


@pytest.mark.world
def test_a_rank_that_never_joins(tmp_path: Path, fault: Record) -> None:
    fault(40, "doctor: one of two ranks never joins")
    world = {"RANK": "0", "WORLD_SIZE": "2", "TAPIR_RENDEZVOUS": f"file://{tmp_path}/meet"}
    rows = run([*TAPIR, "doctor", "--json", "--wait=1"], 1, **world)
    fault.outcome(
        assert_named(rows, "process group", "not all of 2 ranks", "see whether all ranks", rank=0)
    )


@pytest.mark.world
def test_sound_ranks_meet_compare_and_burn_in(tmp_path: Path) -> None:
    flags = ["--ranks=2", "--json", "--seconds=4", f"--out={tmp_path / 'run'}"]
    rows = run([*TAPIR, "doctor", *flags], None)
    slow = {row["check"] for row in rows if row["status"] == "bad"}
    assert slow <= {"matmul"}  # a rank whose core another worker of the tests keeps busy
    checks = {"clock", "shared run folder", "matmul", "link", "all-reduce", "torch", "deepspeed"}
    assert checks <= {row["check"] for row in rows}
    assert {row["rank"] for row in rows} == {0, 1} and {row["host"] for row in rows} == {HOST}
    assert not list(tmp_path.iterdir())


@pytest.mark.world
def test_ranks_of_mpirun_are_listed(tmp_path: Path) -> None:
    mpirun = str(Path(sys.executable).parent / "mpirun")
    command = [mpirun, "-np", "2", *TAPIR, "doctor", "--quick", "--json", f"--out={tmp_path}"]
    rows = run(command, 0)
    assert {row["rank"] for row in rows} == {0, 1}
    assert {"clock", "shared run folder"} <= {row["check"] for row in rows}
