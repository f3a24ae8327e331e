"""Nodes of a Slurm job: which are live, chosen, lost and watched. scontrol is a
stand-in whose answers are written by hand.

The real Slurm is in tests/slurm.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.chain import CANCELLED, read_marker
from cluster.job_runner import JobSettings, run_job
from cluster.slurm.job import fields_of, job_fields, last_words
from cluster.slurm.nodes import (
    NODE_LIST,
    Node,
    allocated,
    chosen,
    describe,
    environment_of,
    live_nodes,
    on_nodes,
)
from cluster.slurm.placement import Placement
from cluster.slurm.watch import Pulse, Watches, beat_file, is_lost, watch, watch_nodes
from tests.harness import PATIENCE

_SCONTROL = """\
#!/bin/bash
echo "$*" >> "$ANSWERS/asked"
case "$*" in
  "-o show job "*) cat "$ANSWERS/job" ;;
  "show hostnames "*) echo "$3" | tr , '\\n' ;;
  "-o show node "*) for n in ${4//,/ }; do grep "^NodeName=$n " "$ANSWERS/nodes"; done ;;
  "show config") echo "SlurmdPort              = $(cat "$ANSWERS/port")" ;;
  "requeue "*) ;;
  *) exit 1 ;;
esac
"""


class Recorded:
    """Answers of scontrol about job 7, whose nodes listen on one port."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        (folder / "port").write_text(f"{port}\n")

    def job(self, nodes: str, state: str = "RUNNING") -> None:
        (self._folder / "job").write_text(
            f"JobId=7 JobName=x JobState={state} ExitCode=0:0 ReqNodeList=(null) NodeList={nodes} "
            "BatchHost=n1 Comment=NodeList=n9\n"
        )

    def nodes(self, **states: str) -> None:
        """A node that is GONE is idle for Slurm, but its slurmd does not answer."""
        closed = socket.create_server(("127.0.0.1", 0))
        gone = closed.getsockname()[1]
        closed.close()
        rows = [
            f"NodeName={name} Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=vm "
            f"Port={gone if state == 'GONE' else self._port} State={state.replace('GONE', 'IDLE')} "
            "Weight=1\n"
            for name, state in states.items()
        ]
        (self._folder / "nodes").write_text("".join(rows))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(_SCONTROL)
    program.chmod(0o755)
    srun = program.with_name("srun")
    srun.write_text("#!/bin/bash\nexec sleep 1000\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("ANSWERS", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("TAPIR_NODES", "n1 n2 n3")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "20007")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (tmp_path / "asked").touch()
        answers = Recorded(tmp_path, listener.getsockname()[1])
        answers.job("n1,n2,n3")
        answers.nodes(n1="ALLOCATED", n2="ALLOCATED", n3="ALLOCATED")
        yield answers


def node(name: str, state: str = "ALLOCATED") -> Node:
    return Node(name=name, address=f"10.0.0.{name[1:]}", port="6818", state=state)


def test_the_first_nodes_are_chosen_and_draining_ones_last() -> None:
    nodes = [node("n1"), node("n2", "ALLOCATED+DRAIN"), node("n3"), node("n4")]
    assert [each.name for each in chosen(nodes, 2)] == ["n1", "n3"]
    assert [each.name for each in chosen(nodes, 4)] == ["n1", "n2", "n3", "n4"]
    assert [each.name for each in chosen(nodes, 1)] == ["n1"]


@pytest.mark.parametrize(
    ("state", "down", "draining"),
    [
        ("ALLOCATED", False, False),
        ("IDLE*", True, False),
        ("DOWN+NOT_RESPONDING", True, False),
        ("ALLOCATED+NOT_RESPONDING", True, False),
        ("MIXED+DRAIN", False, True),
        ("FAIL", True, False),
        ("IDLE+POWERED_DOWN", True, False),
    ],
)
def test_states_of_nodes(state: str, down: bool, draining: bool) -> None:
    assert (node("n1", state).is_down, node("n1", state).is_draining) == (down, draining)


def test_each_start_meets_at_its_first_node_and_a_port_of_its_own() -> None:
    nodes = [node("n2"), node("n5")]
    assert environment_of(nodes, 31_990, 0) == {
        "TAPIR_NODES": "n2 n5",
        "MASTER_ADDR": "10.0.0.2",
        "MASTER_PORT": "31990",
    }
    assert environment_of(nodes, 31_990, 1)["MASTER_PORT"] == "20091"


def test_only_the_option_itself_gets_the_nodes() -> None:
    command = ["srun", NODE_LIST, "tapir", "--x={nodes}", f"--y={NODE_LIST}"]
    assert on_nodes(command, ["n1", "n3"]) == ["srun", "--nodelist=n1,n3", *command[2:]]


def test_fields_of_scontrol() -> None:
    fields = fields_of("JobState=RUNNING NodeList=n1 Command=/a b Comment=x=y NodeList=n9")
    assert fields == {
        "JobState": "RUNNING",
        "NodeList": "n1",
        "Command": "/a",
        "Comment": "x=y",
    }


def test_the_job_has_what_slurm_still_gives_it(slurm: Recorded) -> None:
    assert allocated("7") == ["n1", "n2", "n3"]
    slurm.job("(null)")
    assert allocated("7") == []
    slurm.job("n1,n2", state="COMPLETING")
    assert allocated("7") == [] and job_fields("7")["BatchHost"] == "n1"


def test_of_several_tasks_the_bad_one_is_told(slurm: Recorded, tmp_path: Path) -> None:
    good, bad = "JobState=COMPLETED ExitCode=0:0\n", "JobState=FAILED ExitCode=3:0\n"
    (tmp_path / "job").write_text(good + bad + good)
    assert last_words("7:8") == "FAILED (exit code 3:0)"
    (tmp_path / "job").write_text(good)
    assert last_words("7:8") == "COMPLETED (exit code 0:0)"
    (tmp_path / "job").write_text("")
    assert last_words("7") == "gone (exit code ?)"


def test_live_nodes_answer(slurm: Recorded) -> None:
    slurm.nodes(n1="ALLOCATED", n2="GONE", n3="DOWN+NOT_RESPONDING")
    assert [each.name for each in live_nodes("7")] == ["n1"]
    assert [is_lost(name) for name in ("n1", "n2", "n3", "n4")] == [False, True, True, False]


def test_the_usual_port_is_the_clusters(slurm: Recorded, tmp_path: Path) -> None:
    port = (tmp_path / "port").read_text().strip()
    (tmp_path / "nodes").write_text("NodeName=n1 NodeAddr=127.0.0.1 State=IDLE\n")
    assert describe(["n1", "n8"]) == [
        Node(name="n1", address="127.0.0.1", port=port, state="IDLE"),
    ]


def test_a_lost_node_is_replaced_between_two_starts(
    slurm: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placement = Placement(tmp_path, "prior", gpus=0, used=2, check=False)
    command = ["srun", NODE_LIST, "true"]
    assert placement.place(command) == ["srun", "--nodelist=n1,n2", "true"]
    assert os.environ["TAPIR_NODES"] == "n1 n2" and os.environ["MASTER_PORT"] == "20007"
    assert placement.lost() == []
    slurm.job("n1,n3")
    assert placement.lost() == ["n2"]
    assert placement.place(command) == ["srun", "--nodelist=n1,n3", "true"]
    assert os.environ["TAPIR_NODES"] == "n1 n3" and os.environ["MASTER_PORT"] == "20108"
    slurm.nodes(n1="ALLOCATED", n3="GONE")
    assert placement.place(command) == []


def test_a_node_that_returns_is_used(slurm: Recorded, tmp_path: Path) -> None:
    placement = Placement(tmp_path, "prior", gpus=0, used=2, check=False)
    slurm.nodes(n1="ALLOCATED", n2="GONE", n3="ALLOCATED")
    assert placement.place([NODE_LIST]) == ["--nodelist=n1,n3"]
    slurm.nodes(n1="ALLOCATED", n2="ALLOCATED", n3="GONE")
    assert placement.place([NODE_LIST]) == ["--nodelist=n1,n2"]


def test_a_command_without_spares_keeps_its_nodes(slurm: Recorded, tmp_path: Path) -> None:
    placement = Placement(tmp_path, "prior", gpus=0, used=0, check=False)
    assert placement.place(["true"]) == ["true"]
    assert os.environ["MASTER_ADDR"] == "10.0.0.1"


def test_a_good_end_on_lost_nodes_leaves_no_marker(
    slurm: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.slurm.placement._PATIENCE_SECONDS", 0.0)
    settings = JobSettings(name="x", out=tmp_path, marker="x.json", again="slurm")
    slurm.job("n1,n2")
    assert run_job(settings, ["true"]) == 75
    assert read_marker(str(tmp_path / "markers"), "x.json") == {}
    slurm.job("n1,n2,n3")
    assert run_job(settings, ["true"]) == 0
    assert read_marker(str(tmp_path / "markers"), "x.json")["job"] == "x"


def test_each_start_of_a_job_has_nodes_of_its_own(slurm: Recorded, tmp_path: Path) -> None:
    settings = JobSettings(name="x", out=tmp_path, marker="x.json", again="slurm", nodes=2)
    lose = 'sed -i s/NodeList=n1,n2,n3/NodeList=n1,n3/ "$ANSWERS/job"; exit 3'
    script = f'echo "$1 $TAPIR_NODES" >> "$ANSWERS/log"; grep -q n2 "$ANSWERS/job" && {{ {lose}; }}'
    assert run_job(settings, ["bash", "-c", f"{script}; exit 0", "x", NODE_LIST]) == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        "--nodelist=n1,n2 n1 n2",
        "--nodelist=n1,n3 n1 n3",
    ]
    assert read_marker(str(tmp_path / "markers"), "x.json")["job"] == "x"


def test_a_job_with_too_few_nodes_is_left_to_slurm(slurm: Recorded, tmp_path: Path) -> None:
    settings = JobSettings(name="x", out=tmp_path, marker="x.json", again="slurm", nodes=2)
    slurm.nodes(n1="ALLOCATED", n2="GONE", n3="DOWN")
    assert run_job(settings, ["touch", str(tmp_path / "started")]) == 75
    assert "requeue 7" in (tmp_path / "asked").read_text().splitlines()
    assert not (tmp_path / "started").exists()


def test_spares_watch_first_and_the_batch_host_never() -> None:
    names = ["n1", "n2", "n3", "n4"]
    assert watch_nodes(names, "n1", [], []) == ["n4", "n3"]
    assert watch_nodes(names, "n1", ["n4"], ["n3"]) == ["n2"]
    assert watch_nodes(names, "n4", ["n3"], []) == ["n2", "n1"]
    assert watch_nodes(names[:2], "n1", ["n2"], []) == ["n2"]
    assert watch_nodes(names, "n1", [], ["n3", "n4"]) == []


def test_silence_is_measured_by_the_readers_clock() -> None:
    now = [100.0]
    pulse = Pulse(lambda: now[0])
    assert pulse.silent("1") == 0.0
    now[0] = 130.0
    assert pulse.silent("1") == 30.0
    assert pulse.silent("2") == 0.0
    now[0] = 131.5
    assert pulse.silent("2") == 1.5


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that looks often."""
    monkeypatch.setattr("cluster.slurm.watch.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("cluster.slurm.watch.SILENT_SECONDS", 0.05)


@pytest.mark.usefixtures("quick")
def test_a_silent_host_that_is_lost_queues_the_job_again(slurm: Recorded, tmp_path: Path) -> None:
    slurm.nodes(n1="GONE")
    watch(tmp_path, "x", "7", "n1")
    assert "requeue 7" in (tmp_path / "asked").read_text().splitlines()


@pytest.mark.usefixtures("quick")
def test_a_silent_host_that_answers_is_left_alone(slurm: Recorded, tmp_path: Path) -> None:
    thread = threading.Thread(target=watch, args=(tmp_path, "x", "7", "n1"))
    thread.start()
    until = time.monotonic() + PATIENCE
    while (tmp_path / "asked").read_text().count("show node n1") < 2:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    (tmp_path / CANCELLED).touch()
    thread.join()
    assert "requeue" not in (tmp_path / "asked").read_text()


@pytest.mark.usefixtures("quick")
def test_a_job_beats_while_it_runs(slurm: Recorded, tmp_path: Path) -> None:
    slurm.job("n1")
    with Watches(tmp_path, "x"):
        until, words = time.monotonic() + PATIENCE, ["", "0"]
        while int(words[1]) < 3:  # the first beat is made before the thread starts
            assert time.monotonic() < until
            time.sleep(0.01)
            words = beat_file(tmp_path, "x").read_text().split() or words
        assert words[0] == str(os.getpid())
    assert not beat_file(tmp_path, "x").exists()
