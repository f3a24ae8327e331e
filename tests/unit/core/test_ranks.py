"""Launchers' environment variables: which rank they give a process, and what is refused."""

import logging
import os
import socket
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

import parallel.world
from core.errors import InputError
from core.gpus import gpu_of_worker
from core.launch_environment import (
    FIRST_PORT,
    Ranks,
    free_ports,
    local_rank,
    local_ranks,
    ranks_given,
    ranks_of,
    refuse_left_socket,
)
from core.log import LOG, set_up_logging
from core.workers import JobWorker, job_worker_of
from tests.harness import ENVIRONMENT, installed, tapir

TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "4294967290",  # an interactive step's
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
PTY = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
"""srun --pty bash: one step of one task."""
PMI = {"PMI_RANK": "0", "PMI_SIZE": "2"}
ALONE = {"PMI_RANK": "0", "PMI_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "launcher", "size"),
    [
        ({}, None, None),
        (PTY, None, None),
        ({**PTY, **ALONE}, None, None),  # srun --mpi=pmi2 --pty bash
        ({**STEP, **ALONE}, "srun", 2),  # srun -n 2 inside of that
        (STEP, "srun", 2),
        ({**STEP, "WORLD_SIZE": "2"}, "srun", 2),  # export WORLD_SIZE=$SLURM_NTASKS
        ({**STEP, **TORCH, "WORLD_SIZE": "8"}, "torchrun", 8),  # torchrun in each task
        ({**PTY, **TORCH}, "torchrun", 2),
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, "mpirun", 4),  # mpirun in an allocation
        (PMI, "mpirun", 2),
        (ALONE, "mpirun", 1),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, "mpirun", 3),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "torchrun", 1),
        ({"MASTER_ADDR": "left.over", "MASTER_PORT": "x"}, None, None),
        ({"RANK": "0", "WORLD_SIZE": "2", "TAPIR_RENDEZVOUS": "file:///x"}, "torchrun", 2),
    ],
)
def test_which_launcher_started_a_process(
    environment: dict[str, str], launcher: str | None, size: int | None
) -> None:
    ranks = ranks_of(environment)
    assert (ranks and ranks.launcher) == launcher
    assert ranks_given(environment) == (ranks and ranks.size) == size


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({**TORCH, "RANK": "x"}, ["RANK='x'"]),
        ({**TORCH, "RANK": ""}, ["RANK=''"]),
        ({**TORCH, "RANK": "2"}, ["RANK='2'", "0 to 1"]),
        ({**TORCH, "RANK": "-1"}, ["RANK='-1'"]),
        ({**TORCH, "WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE='99"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE='4'", "without RANK", "unset WORLD_SIZE"]),
        ({**PTY, "WORLD_SIZE": "4"}, ["WORLD_SIZE='4'", "without RANK"]),
        ({**STEP, "WORLD_SIZE": "4"}, ["WORLD_SIZE='4'", "srun started 2 ranks"]),
        ({"RANK": "0"}, ["RANK='0'", "without WORLD_SIZE", "unset RANK"]),
        ({**STEP, "RANK": "0"}, ["RANK='0'", "without WORLD_SIZE", "srun started 2 ranks"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR is not set", "MASTER_PORT is not set"]),
        ({**TORCH, "MASTER_ADDR": " "}, ["MASTER_ADDR is not set"]),
        ({**TORCH, "MASTER_PORT": "abc"}, ["MASTER_PORT='abc'", "1 to 65535"]),
        ({**TORCH, "MASTER_PORT": "0"}, ["MASTER_PORT='0'"]),
        ({**TORCH, "MASTER_PORT": "99999"}, ["MASTER_PORT='99999'"]),
        ({**TORCH, "LOCAL_RANK": "-1"}, ["LOCAL_RANK='-1'"]),
        ({**TORCH, "LOCAL_RANK": "abc", "RANK": "y"}, ["LOCAL_RANK='abc'", "RANK='y'"]),
        ({**TORCH, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK='2'", "0 to 1"]),
        ({**TORCH, "LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE='x'"]),
        ({**STEP, "SLURM_PROCID": "x"}, ["SLURM_PROCID='x'"]),
        ({**STEP, "SLURM_PROCID": "2"}, ["SLURM_PROCID='2'"]),
        ({**STEP, "SLURM_NODEID": "x"}, ["SLURM_NODEID='x'"]),
        ({**STEP, "SLURM_LOCALID": "odd"}, ["SLURM_LOCALID='odd'"]),
        ({**STEP, "SLURM_JOB_ID": "1_2"}, ["SLURM_JOB_ID='1_2'"]),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST is not set"]),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(y)"}, ["SLURM_STEP_TASKS_PER_NODE='2(y)'"]),
        ({k: v for k, v in STEP.items() if k != "SLURM_PROCID"}, ["SLURM_PROCID is not set"]),
        ({"PMI_SIZE": "2"}, ["PMI_SIZE='2'", "without PMI_RANK"]),
        ({**PMI, "PMI_RANK": "2"}, ["PMI_RANK='2'"]),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_RANK='0'", "OMPI_COMM_WORLD_SIZE"]),
        ({**PMI, "MPI_LOCALRANKID": "z"}, ["MPI_LOCALRANKID='z'"]),
        ({**PMI, "MPI_LOCALNRANKS": "0"}, ["MPI_LOCALNRANKS='0'"]),
    ],
)
def test_odd_and_incomplete_variables_are_named(
    environment: dict[str, str], named: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        ranks_given(environment)
    assert all(text in str(caught.value) for text in named), str(caught.value)
    assert "a process alone needs none" in str(caught.value)


@pytest.mark.seconds
def test_a_left_over_world_size_ends_a_training_in_exit_code_2() -> None:
    text = tapir("train", "prior", "tiny", code=2, WORLD_SIZE="4")
    assert "WORLD_SIZE='4'" in text and "without RANK" in text and "Traceback" not in text


def test_a_place_on_the_machine_is_read_as_a_number_or_refused() -> None:
    assert [local_rank({}), local_rank(PTY), local_rank({**STEP, "SLURM_LOCALID": "1"})] == [
        None,
        None,
        1,
    ]
    for read in (local_rank, lambda environment: gpu_of_worker(0, 2, environment)):
        with pytest.raises(InputError, match="LOCAL_RANK='-1'"):
            read({"LOCAL_RANK": "-1"})
    with pytest.raises(InputError, match="SLURM_NODEID is not set"):
        local_ranks({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"})


def test_the_log_takes_an_odd_rank_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = list(LOG.handlers)
    monkeypatch.setenv("RANK", "²")  # str.isdigit holds, int does not take it
    set_up_logging()
    LOG.handlers[:] = handlers
    assert LOG.level == logging.INFO, "it speaks as rank 0 does"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "1"}, "without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "RANK='²'"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_MIN": "x",
            },
            "SLURM_ARRAY_TASK_MIN in the environment must be whole numbers",
        ),
    ],
)
def test_odd_variables_of_workers_are_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=named):
        job_worker_of("")


def test_workers_of_srun_share_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks_of() == Ranks(launcher="srun", rank=1, size=2)
    assert job_worker_of("") == JobWorker(number=1, count=2)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "No such file"),
        ("echo slurm_load: Unable to contact slurm controller >&2; exit 1", "Unable to contact"),
        ("echo n1", "names no NodeAddr"),
        (":", "names no NodeAddr"),
    ],
)
def test_without_scontrol_the_address_is_asked_for(
    script: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=f"nodes n1, and scontrol[\\s\\S]*{why}[\\s\\S]*MASTER_ADDR"
    ):
        parallel.world._address_of("n1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert parallel.world._address_of("n1") == "10.0.0.1"


@pytest.mark.parametrize(
    ("library", "named"),
    [({}, "MPI knows of 1"), ({"MPI4PY_LIBMPI": "/nonexistent.so"}, "MPI cannot be used: cannot")],
)
def test_variables_of_an_mpi_that_is_not_there_are_refused(
    library: dict[str, str], named: str
) -> None:
    """Otherwise each rank would train alone, all into the same folder."""
    if not library and not installed("mpich") and find_library("mpi") is None:
        pytest.skip("needs an MPI library: pip install mpich")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # MPI starts in a process once
        os.environ.update({**PMI, **library})
        try:
            parallel.world.join_world()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    assert text.startswith("InputError") and named in text and "unset them" in text, text


def test_a_killed_forkserver_is_a_rank_error_with_a_sentence() -> None:
    code = (
        "from cluster.launcher import launch\n"
        "from core.errors import RankError\n"
        "try: launch('json:dumps', '{}', 2, ['tests.multiprocess.dies'])\n"
        "except RankError as error: print(error.exit_code, error.retry, error)\n"
    )
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert "1 True the process that starts the ranks" in done.stdout, done.stdout + done.stderr
    assert "died before rank-0 had begun" in done.stdout and "Traceback" not in done.stderr


def test_a_left_socket_of_mpirun_is_refused_before_mpi_ends_the_process() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        refuse_left_socket({"PMI_FD": str(ours.fileno())})
    refuse_left_socket({})
    for text in (str(ours.fileno()), "0x7", "-1", str(2**70)):
        with pytest.raises(InputError, match=r"PMI_FD=.* is not a socket of mpirun's"):
            refuse_left_socket({"PMI_FD": text})


def test_free_ports_are_below_those_of_connections_and_all_different() -> None:
    """Of 500 single draws from 9,760 ports some would be equal, but for 3 times in a million."""
    ports = free_ports(500)
    assert len(set(ports)) == 500 and min(ports) >= 10_240 and max(ports) < FIRST_PORT
    assert all(port + 10_000 not in ports for port in free_ports(2, beside=10_000))
