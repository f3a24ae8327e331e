"""Memory of a server and its ranks over 1,000 requests of many kinds."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.multiprocess.serving.hostile_requests import EDIT, GENERATE
from tests.multiprocess.serving.served import CAPTIONS, Served, mask_png, png, served
from tests.unit.finished import PIXELS

pytestmark = [pytest.mark.world, pytest.mark.slow]
_FIRST, _ALL = 200, 1000
_MASK = mask_png(PIXELS, slice(0, 8), slice(0, 16))
_IMAGE = png([[[i, 2 * i, 0] for i in range(PIXELS)] for _ in range(PIXELS)])


def ask(client: httpx.Client, number: int) -> None:
    """The request of a number: a picture, events, one that is left, an edit, or a wrong one."""
    caption = CAPTIONS[number % 2]
    body = {"prompt": caption, "n": 1 + number % 2, "seed": number}
    match number % 5:
        case 0:
            assert client.post(GENERATE, json=body).status_code == 200
        case 1:
            asked = {**body, "stream": True, "partial_images": 2}
            assert "completed" in client.post(GENERATE, json=asked).text
        case 2:
            asked = {**body, "n": 4, "stream": True, "partial_images": 3}
            with client.stream("POST", GENERATE, json=asked) as answer:
                next(answer.iter_lines())
        case 3:
            files = {"image": ("a.png", _IMAGE, "image/png"), "mask": ("m.png", _MASK, "image/png")}
            assert client.post(EDIT, data={"prompt": caption}, files=files).status_code == 200
        case _:
            wrong = {"prompt": f"{caption} {number}" * 100, "n": 99, "guidance": -1}
            assert client.post(GENERATE, json=wrong).status_code == 400


def memory(server: Served) -> float:
    """Bytes of all processes of a server, shared pages counted once."""
    first = psutil.Process(server.process.pid)
    return sum(x.memory_full_info().pss for x in [first, *first.children(recursive=True)])


def test_memory_is_flat_over_a_thousand_requests(tmp_path: Path) -> None:
    with (
        served(tmp_path, "--rows=8", "--pictures-kept=64") as server,
        server.client() as client,
        ThreadPoolExecutor(8) as clients,
    ):
        list(clients.map(lambda number: ask(client, number), range(_FIRST)))
        server.until_metric("tapir_busy_rows", 0)
        early = memory(server)
        list(clients.map(lambda number: ask(client, number), range(_FIRST, _ALL)))
        server.until_metric("tapir_busy_rows", 0)
        late = memory(server)
        assert late < early + 12e6, (early, late)
        assert not server.traceback() and server.metric("tapir_restarts_total") == 0
