"""The parts of `tapir doctor`: rows, outliers, clocks, rendezvous, GPU error counters."""

import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.doctor.compare import ROUNDS, Told, clock_rows
from cluster.doctor.config import DoctorConfig
from cluster.doctor.finding import Finding, bad, ok, placed, run_checks, warning, worst
from cluster.doctor.gpus import counter_rows, xid_rows
from cluster.doctor.machine import package_findings, requirements
from cluster.doctor.meeting import Lost, Rendezvous, meet, rendezvous_of
from cluster.doctor.node import _store_findings
from cluster.doctor.outliers import Burned, burn_rows
from cluster.doctor.report import as_json, exit_code, merged
from cluster.doctor.stores import _try_rights, store_findings
from core.storage.store import FolderStore
from parallel.diagnostics.checks import _turn
from tests.harness import ENVIRONMENT, tapir

SOUND = Burned(rank=0, host="a", rate=1e12, link=1e9, reduce=1e9)


def _burned(count: int, hosts: int = 1) -> list[Burned]:
    """Measurements of equal ranks, block-distributed over the hosts."""
    names = [f"host{rank * hosts // count}" for rank in range(count)]
    return [replace(SOUND, rank=rank, host=name) for rank, name in enumerate(names)]


def _wrong(rows: list[Finding]) -> list[tuple[str, str, int | None]]:
    return [(row.check, row.status, row.rank) for row in rows if row.status != "ok"]


def test_equal_ranks_have_no_outliers() -> None:
    rows = burn_rows(_burned(8, hosts=2))
    assert not _wrong(rows)
    assert [row.check for row in rows] == ["matmul", "link", "all-reduce"]
    assert [row.check for row in burn_rows([replace(SOUND, link=0, reduce=0)])] == ["matmul"]


def test_slow_ranks_are_named() -> None:
    ranks = _burned(4)
    ranks[2] = replace(ranks[2], rate=0.4e12, host="slow")
    ranks[3] = replace(ranks[3], rate=0.7e12)
    assert _wrong(burn_rows(ranks)) == [("matmul", "bad", 2), ("matmul", "warning", 3)]
    row = burn_rows(ranks)[0]
    assert row.host == "slow" and "0.4 TFLOP/s, 40% of the median of 4 ranks" in row.observed
    two = [SOUND, replace(SOUND, rank=1, rate=0.3e12)]
    assert _wrong(burn_rows(two)) == [("matmul", "bad", 1)]


def test_links_are_compared_with_their_kind() -> None:
    ranks = _burned(8, hosts=4)  # 1-2, 3-4, 5-6 and 7-0 go between machines
    ranks = [replace(each, link=1e8 if each.rank % 2 else 1e9) for each in ranks]
    assert not _wrong(burn_rows(ranks))
    ranks[3] = replace(ranks[3], link=2e7)
    rows = burn_rows(ranks)
    assert _wrong(rows) == [("link", "bad", 3)]
    assert "rank 3 (host1) to rank 4 (host2): 0.02 GB/s, 20% of the median" in rows[1].observed


@pytest.mark.parametrize("links", [1, 3, 4, 5, 8, 9])
def test_links_of_a_turn_share_no_rank(links: int) -> None:
    world = max(links, 2)
    for turn in (0, 1, 2):
        ends = [
            rank
            for link in range(links)
            if _turn(link, links) == turn
            for rank in (link, (link + 1) % world)
        ]
        assert len(ends) == len(set(ends))


def test_clocks_are_compared_with_the_median() -> None:
    def told(rank: int, offset: float) -> Told:
        times = [1000.0 + i + offset for i in range(ROUNDS)]
        return Told(rank=rank, host=f"h{rank}", seen="", times=times, rows=[])

    assert not _wrong(clock_rows([told(0, 0.0), told(1, 0.2)]))
    rows = clock_rows([told(0, -300.0), told(1, 0.0), told(2, 5.0)])
    assert _wrong(rows) == [("clock", "bad", 0), ("clock", "warning", 2)]
    assert "300.0 s behind the median" in rows[0].observed and rows[0].host == "h0"
    assert clock_rows([told(0, 0.0)]) == []


def test_a_check_that_hangs_or_fails_becomes_a_row() -> None:
    end = threading.Event()

    def hang() -> list[Finding]:
        end.wait()
        return []

    def fail() -> list[Finding]:
        raise OSError("stale file handle")

    rows = run_checks({"disk": hang, "net": fail, "host": lambda: [ok("host", "fine")]}, 0.2)
    end.set()
    assert [(row.check, row.status) for row in rows] == [
        ("disk", "bad"),
        ("net", "bad"),
        ("host", "ok"),
    ]
    assert "no answer within 0.2 s" in rows[0].observed and "stale file handle" in rows[1].observed


def test_rows_hold_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    row = placed([bad("store", "refused very-secret, 100% sure", "mend")], 3)[0]
    assert row.observed == "refused ***, 100% sure" and (row.host, row.rank) == ("n7", 3)


def test_equal_rows_of_ranks_are_shown_once() -> None:
    rows = [replace(ok("disk", f"{rank} GB"), host="a", rank=rank) for rank in range(9)]
    rows += [replace(bad("port", "blocked", "open"), host=f"h{rank}", rank=rank) for rank in (0, 1)]
    rows += [replace(warning("port", "slow", "look"), host="a", rank=2)]
    shown = [(row.status, where) for row, where in merged(rows)]
    assert shown == [
        ("ok", "a rank 0, 1, 2, 3, 4, 5, ..."),
        ("warning", "a rank 2"),
        ("bad", "2 nodes: h0, h1 rank 0, 1"),
    ]
    assert exit_code(rows) == 1 and exit_code(rows[:9]) == 0 and worst([]) == "ok"
    body = as_json(rows)
    assert (body["status"], body["ok"], body["warning"], body["bad"]) == ("bad", 9, 1, 2)
    assert set(body["rows"][0]) == {"check", "status", "observed", "fix", "host", "rank"}


def test_what_nvidia_smi_and_the_kernel_count() -> None:
    table = "0, NVIDIA H100, 0, Not Active, Not Active\n1, NVIDIA H100, 12, Not Active, Active\n"
    rows = counter_rows(table)
    assert [row.status for row in rows] == ["bad", "warning"]
    assert "GPU 1 (NVIDIA H100) has 12" in rows[0].observed and "by heat" in rows[1].observed
    assert counter_rows("0, NVIDIA T4, [N/A], Not Active, Not Active\n")[0].status == "ok"
    line = "[ 12.3] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
    assert [row.observed for row in xid_rows(line * 2)] == ["Xid 79 of 0000:3b:00, 2 times"]


def test_packages_against_their_bounds() -> None:
    assert "torch>=2.6" in requirements() and len(requirements()) >= 19
    assert package_findings(["numpy>=1", "no-such-package>=1; sys_platform == 'win32'"]) == [
        ok("packages", "2 packages as requirements.txt asks")
    ]
    rows = package_findings(["numpy>=99", "no-such-package>=1", "numpy>=1"])
    assert [row.status for row in rows] == ["bad", "bad"]
    assert "numpy>=99" in rows[0].fix and "no-such-package is not installed" in rows[1].observed


def test_a_place_is_named_by_the_environment() -> None:
    world = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert rendezvous_of(world) == Rendezvous(rank=1, size=4, address="n1", port=29500)
    assert rendezvous_of({**world, "TORCHELASTIC_USE_AGENT_STORE": "True"}) is None
    assert rendezvous_of({"SLURM_PROCID": "1"}) is None


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _meet(rank: int, port: int, seconds: float) -> list[list[str]]:
    """One of three ranks exchanges two texts with the others."""
    place = Rendezvous(rank=rank, size=3, address="127.0.0.1", port=port)
    with meet(place, seconds) as meeting:
        return [meeting.gather(f"{word} of {rank}") for word in ("name", "time")]


def test_ranks_meet_and_tell_rank_0(port: int) -> None:
    with ThreadPoolExecutor(3) as pool:
        messages = list(pool.map(lambda rank: _meet(rank, port, 20.0), range(3)))
    assert messages[0] == [[f"{word} of {rank}" for rank in range(3)] for word in ("name", "time")]
    assert messages[1] == messages[2] == [["name of 0"], ["time of 0"]]


@pytest.mark.seconds
def test_strangers_and_missing_ranks_do_not_end_a_meeting(port: int) -> None:
    over = threading.Event()

    def stranger() -> None:
        while not over.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port)) as link:
                    link.sendall(b'"program 2"\n"name"\n"time"\n')
                    link.recv(1)
                return
            except ConnectionRefusedError:
                continue

    with ThreadPoolExecutor(3) as pool:
        pool.submit(stranger)
        ranks = [pool.submit(_meet, rank, port, 2.0) for rank in (0, 1)]
        wait(ranks)
        over.set()
    words = ("name", "time")
    assert ranks[0].result() == [[f"{word} of 0", f"{word} of 1", ""] for word in words]
    assert ranks[1].result() == [["name of 0"], ["time of 0"]]


def test_a_name_of_rank_0_that_does_not_resolve(port: int) -> None:
    place = Rendezvous(rank=1, size=2, address="no-such-host.invalid", port=port)
    with pytest.raises(Lost) as caught, meet(place, 0.2):
        pass
    assert "does not resolve" in caught.value.row.observed
    assert "MASTER_ADDR" in caught.value.row.fix


class Overwrites(FolderStore):
    """A store that ignores If-None-Match, as some do."""

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        return super().put(name, data)


def test_rights_of_folders_and_of_stores_that_overwrite(tmp_path: Path) -> None:
    rows = store_findings(str(tmp_path / "new"), "write", 1000)
    assert [row.check for row in rows] == ["store rights", "store speed"]
    assert worst(rows) != "bad" and not list(tmp_path.iterdir())
    row = store_findings(str(tmp_path / "new"), "read", 1000)[0]
    assert row.status == "bad" and "there is no folder" in row.observed
    row = _try_rights(Overwrites(tmp_path), "write", 1000)[0]
    assert row.status == "bad" and "If-None-Match" in row.observed


def test_each_store_of_a_mixture_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    data = f"{tmp_path}/a:0.5,{tmp_path}/b:0.5"
    rows = _store_findings(DoctorConfig(data=data, rights="read"), 1000)
    assert [(row.check, row.status) for row in rows] == [("store rights", "ok"), ("store", "bad")]
    assert f"{tmp_path}/b" in rows[1].observed
    assert "must be 1; write a:0.5,b:0.5" in DoctorConfig(data="a:1,b:1").problems()[0]


def test_wrong_flags_are_all_named() -> None:
    config = DoctorConfig(data="ftp://x", memory=-1, files=-1, wait=0, node=True, ranks=2)
    assert len(config.problems()) == 5
    assert DoctorConfig(data="s3://bucket/raw").problems() == []
    text = tapir("doctor", "--data=s3:///raw", code=2)
    assert "write s3://bucket/prefix" in text
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    text = tapir("doctor", "--ranks=2", code=2, WORLD_SIZE="2", RANK="0", **meet)
    assert "leave out --ranks" in text


def test_the_checks_of_a_node_import_no_torch() -> None:
    code = (
        "import sys, workflow.doctor\n"
        "from cluster.doctor.config import DoctorConfig\n"
        "from cluster.doctor.node import node_findings\n"
        "assert node_findings(DoctorConfig(node=True, data='/tmp'), 0)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0
