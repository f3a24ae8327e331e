"""The costs of a start: the model's arithmetic, the fit, and the requests that a proxy counts."""

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from cli.plan import plan
from core.launch_environment import free_port
from parallel.config import MeshConfig
from planning.start_up.light_ranks import run_light_ranks
from planning.start_up.model import (
    Constants,
    Measured,
    fitted,
    groups,
    rank_seconds,
    start_costs,
    store_requests,
    store_seconds,
)
from planning.start_up.store_proxy import HOST, Requests, StoreProxy, Unknown

PAPER = MeshConfig(tensor=8, pipeline=8, data=16)


def test_requests_of_a_rank_grow_with_the_logarithm_of_the_world() -> None:
    """7 to meet, one a group, three for each peer: 1, 3, 5, ... of a barrier."""
    worlds = (2, 3, 4, 8, 64, 1024)
    assert [store_requests(world, 2) for world in worlds] == [12, 15, 18, 24, 42, 66]
    assert [groups(mesh) for mesh in (MeshConfig(data=8), PAPER)] == [2, 18]
    assert groups(MeshConfig(data=8, nodes=2)) == 4


def test_costs_of_the_papers_mesh() -> None:
    constants = Constants(
        imports=4.0,
        rank=0.5,
        rank_level=0.001,
        group=0.25,
        group_each=0.002,
        store=0.003,
        request=1e-4,
        check=1e-3,
        dump=2e-3,
        load=3e-3,
    )
    costs = start_costs(PAPER, 100, constants)
    assert (costs.store_requests_a_rank, costs.store_requests) == (82, 82 * 1024)
    assert (costs.data_requests, costs.data_readers) == (6, 256)
    assert costs.seconds == pytest.approx(
        {
            "imports": 4.0,
            "meeting": 0.5 + 0.01,
            "groups": 0.25 * 16 + 2.048,
            "store": 0.003 + 8.3968,
            "manifest": 0.6,
        }
    )
    assert costs.total == pytest.approx(4 + 0.51 + 6.048 + 8.3998 + 0.6)


def test_one_rank_meets_nobody() -> None:
    costs = start_costs(MeshConfig(), 100, Constants(imports=1.0, check=0.01))
    assert costs.seconds == pytest.approx(
        {"imports": 1.0, "meeting": 0.0, "groups": 0.0, "store": 0.0, "manifest": 1.0}
    )
    assert (costs.store_requests, costs.data_requests, costs.data_readers) == (0, 6, 1)


@pytest.mark.parametrize(("pipeline", "readers"), [(1, 24), (2, 24), (3, 16), (4, 12), (6, 8)])
def test_the_outer_stages_read_data(pipeline: int, readers: int) -> None:
    mesh = MeshConfig(pipeline=pipeline, data=24 // pipeline)
    assert start_costs(mesh).data_readers == readers


def test_a_fit_returns_the_constants_that_made_its_rows() -> None:
    true = Constants(rank=0.02, rank_level=3e-4, store=7e-4, request=2e-5)
    worlds = {4: 100, 16: 900, 64: 5000}
    rows = [
        Measured(
            world=world,
            rank=rank_seconds(world, true),
            store=store_seconds(requests, true),
            requests=requests,
        )
        for world, requests in worlds.items()
    ]
    fit = fitted(rows)
    assert (fit.rank, fit.rank_level) == pytest.approx((0.02, 3e-4))
    assert (fit.store, fit.request) == pytest.approx((7e-4, 2e-5))
    with pytest.raises(ValueError, match="two sizes"):
        fitted(rows[:1])


def test_a_plan_names_seconds_and_requests(capsys: pytest.CaptureFixture[str]) -> None:
    plan(["tiny", "--world", "4", "--json"])
    out = capsys.readouterr().out
    start = json.loads(out.splitlines()[-1])["best"]["start_up"]
    assert start["seconds"] == pytest.approx(sum(start["seconds_of"].values()))
    assert set(start["requests"]) == {"store", "store_a_rank", "data"}
    assert start["requests"]["store"] == 4 * start["requests"]["store_a_rank"] > 0
    assert start["requests"]["data"] == 6 and start["shards"] == 125_000
    assert "host_a_rank" in start and "its start: " in out


def _string(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def test_requests_are_cut_at_any_byte() -> None:
    """Number, then fields: strings with a 64-bit length, and counts before lists of keys."""
    sent = b"\x00" + b"....", b"\x01" + _string("key") + _string("value"), b"\x04" + _string("k")
    stream = b"".join(sent) + (7).to_bytes(8, "little")  # add ends with a number
    stream += b"\x06" + (2).to_bytes(8, "little") + _string("a") + _string("") + b"\x0c"
    names = ["validate", "set", "add", "wait", "cancel_wait"]
    assert list(Requests().feed(stream)) == names
    one = Requests()
    assert [name for i in range(len(stream)) for name in one.feed(stream[i : i + 1])] == names
    assert one.left == b""
    with pytest.raises(Unknown, match="request number 200"):
        list(Requests().feed(b"\xc8"))


def test_the_proxy_counts_a_clients_requests() -> None:
    """`get` and `multi_get` wait for their keys first; a new client validates and pings."""
    seconds = timedelta(seconds=60)
    server = TCPStore(HOST, free_port(), None, True, seconds, wait_for_workers=False)
    calls: list[tuple[Callable[[Any], Any], dict[str, int]]] = [
        (lambda store: store.set("a", "1"), {"set": 1}),
        (lambda store: store.get("a"), {"wait": 1, "get": 1}),
        (lambda store: store.add("n", 2), {"add": 1}),
        (lambda store: store.check(["a", "b"]), {"check": 1}),
        (lambda store: store.compare_set("a", "1", "2"), {"compare_set": 1}),
        (lambda store: store.multi_get(["a", "n"]), {"wait": 1, "multi_get": 1}),
        (lambda store: store.multi_set(["x", "y"], ["1", "2"]), {"multi_set": 1}),
        (lambda store: store.append("a", "3"), {"append": 1}),
        (lambda store: store.num_keys(), {"num_keys": 1}),
        (lambda store: store.delete_key("a"), {"delete": 1}),
    ]
    expected = {"validate": 1, "ping": 1}
    with StoreProxy(server.port) as proxy:
        for _ in range(1000):  # until it listens
            with suppress(ConnectionRefusedError):
                socket.create_connection((HOST, proxy.port)).close()
                break
            time.sleep(0.01)
        store = TCPStore(HOST, proxy.port, None, False, seconds, wait_for_workers=False)
        for call, counts in calls:
            call(store)
            for name, count in counts.items():
                expected[name] = expected.get(name, 0) + count
    assert proxy.counts == expected and not proxy.failure


def test_clients_of_a_store_that_begins_anew_wait_and_are_counted_apart() -> None:
    """As those of rank 0 at a restart: they may come before the store is there."""
    seconds, port = timedelta(seconds=60), free_port()
    with StoreProxy(port) as proxy:
        for round_ in range(2):
            server = TCPStore(HOST, port, None, True, seconds, wait_for_workers=False)
            while True:
                try:
                    socket.create_connection((HOST, proxy.port)).close()
                    break
                except ConnectionRefusedError:
                    continue
            stores = [
                TCPStore(HOST, proxy.port, None, False, seconds, wait_for_workers=False)
                for _ in range(2)
            ]
            for number, store in enumerate(stores, round_ + 1):
                for _ in range(number):
                    store.add("n", 1)
            del server
            with pytest.raises(RuntimeError):
                while True:
                    stores[0].add("n", 0)
            del stores, store
    adds = [[client["add"] for client in clients if client] for clients in proxy.stores]
    assert [[row[1] for row in adds]] == [[2, 3]] and not proxy.failure
    assert proxy.counts["ping"] == 4


@pytest.mark.world
@pytest.mark.parametrize(
    ("mesh", "made", "more"),
    [(MeshConfig(data=4), 2, 0), (MeshConfig(tensor=2, pipeline=2), 18, 3)],
)
def test_light_ranks_make_the_requests_of_the_model(mesh: MeshConfig, made: int, more: int) -> None:
    """Without those of waiting; some ranks are in one more of megatron-core's groups."""
    run = run_light_ranks(mesh)
    assert sorted(row["rank"] for row in run.rows) == [0, 1, 2, 3]
    counts = dict(run.requests)
    waiting = counts.pop("check") + counts.pop("compare_set", 0) + counts.pop("add") - 9
    assert waiting >= 3
    assert groups(mesh) == made
    assert 0 <= sum(counts.values()) + 9 - 3 * store_requests(4, made) <= more
    assert all(row["seconds"]["rank"] > 0 for row in run.rows)
    assert [row["seconds"]["store"] > 0 for row in run.rows] == [True, False, False, False]
