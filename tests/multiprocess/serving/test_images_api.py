"""The images API of a real server: its pictures are those of `tapir sample`, and it withstands."""

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from data_pipeline.images.crops import encode_png
from generation.config import ModelPaths
from tests.harness import PATIENCE
from tests.multiprocess.serving.hostile_requests import HOSTILE, ODD, Hostile
from tests.multiprocess.serving.served import CAPTIONS, TOKEN, Served, mask_png, served, tree
from tests.unit.finished import PIXELS, write_models

pytestmark = pytest.mark.world
GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ModelPaths:
    """Models with other weights."""
    return write_models(tmp_path_factory.mktemp("other"), CAPTIONS, seed=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, other: ModelPaths) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    flags = f"--token-file={folder / 'token'}", "--rows=4", "--upload-mb=11"
    with served(folder, *flags, more=(f"other={other.prior.parent}",)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client(headers=AUTHORIZED) as each:
        yield each


@pytest.fixture
def tools(server: Served) -> openai.OpenAI:
    own = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=TOKEN, http_client=own)


def pictures(answer: httpx.Response) -> list[bytes]:
    """The PNGs of an answer in the order in which they were drawn."""
    assert answer.status_code == 200, answer.text
    data = sorted(answer.json()["data"], key=lambda each: each["candidate"])
    return [base64.b64decode(each["b64_json"]) for each in data]


def request(caption: str, **more: object) -> dict[str, object]:
    return {"prompt": caption, "response_format": "b64_json", **more}


def test_a_key_gives_the_picture_of_tapir_sample_whatever_runs_beside_it(
    server: Served, client: httpx.Client, tmp_path: Path
) -> None:
    expected = server.sampled(tmp_path / "a", CAPTIONS[0], 3, "--seed=5")
    guided = server.sampled(tmp_path / "b", CAPTIONS[1], 2, "--seed=6", "--guidance=3")
    answers: dict[int, httpx.Response] = {}

    def ask(i: int) -> None:
        plain = request(CAPTIONS[0], n=3, seed=5)
        other = request(CAPTIONS[1], n=2, seed=6, guidance=3)
        answers[i] = client.post(GENERATE, json=other if i % 2 else plain)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answer in sorted(answers.items()):
        assert pictures(answer) == (guided if i % 2 else expected), i
    scores = [each["score"] for each in answers[0].json()["data"]]
    assert scores == sorted(scores, reverse=True)


def test_the_client_of_openai_draws_and_edits(
    server: Served, tools: openai.OpenAI, tmp_path: Path
) -> None:
    drawn = tools.images.generate(
        prompt=CAPTIONS[0], n=2, response_format="url", extra_body={"seed": 1}
    )
    assert drawn.data is not None and len(drawn.data) == 2
    png = httpx.get(str(drawn.data[0].url), trust_env=False).content
    expected = server.sampled(tmp_path / "a", CAPTIONS[0], 2, "--seed=1")
    assert png in expected
    mask = mask_png(PIXELS, slice(8, 16), slice(4, 12))
    edited = tools.images.edit(
        image=("a.png", png),
        mask=("mask.png", mask),
        prompt=CAPTIONS[1],
        response_format="b64_json",
        extra_body={"seed": 2, "codes": True},
    )
    assert edited.data is not None
    (tmp_path / "a.png").write_bytes(png)
    bright = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    bright[8:16, 4:12] = 255
    (tmp_path / "bright.png").write_bytes(encode_png(bright))
    flags = f"--image={tmp_path / 'a.png'}", f"--mask={tmp_path / 'bright.png'}", "--seed=2"
    (same,) = server.sampled(tmp_path / "b", CAPTIONS[1], 1, *flags)
    assert base64.b64decode(str(edited.data[0].b64_json)) == same
    assert [model.id for model in tools.models.list()] == ["tiny", "other"]


def test_the_name_of_a_model_chooses_it(
    server: Served,
    client: httpx.Client,
    tools: openai.OpenAI,
    other: ModelPaths,
    tmp_path: Path,
) -> None:
    drawn = {
        name: pictures(client.post(GENERATE, json=request(CAPTIONS[0], seed=4, model=name)))
        for name in ("tiny", "other", "dall-e-3")
    }
    assert drawn["tiny"] == drawn["dall-e-3"] != drawn["other"]
    expected = server.sampled(tmp_path, CAPTIONS[0], 1, "--seed=4", models=other)
    assert drawn["other"] == expected
    with pytest.raises(openai.NotFoundError) as raised:
        tools.images.generate(prompt=CAPTIONS[0], model="tinny")
    assert raised.value.code == "model_not_found"
    assert "did you mean 'tiny'?; there are: tiny, other" in raised.value.message


def test_what_the_models_do_not_read_of_a_caption_is_told(client: httpx.Client) -> None:
    long = "a purple circle " * 8
    cut, unknown = client.post(GENERATE, json=request(long)).json()["warnings"][::2]
    assert "the prior reads the first 8 of the caption's" in cut and "'a purple" in cut
    assert "no training caption of these models has 'purple'" in unknown and "circle" in unknown
    assert client.post(GENERATE, json=request(CAPTIONS[0])).json()["warnings"] == []
    asked = request(long, stream=True, partial_images=1)
    lines = client.post(GENERATE, json=asked).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [each["warnings"][0] for each in events] == [cut, cut]


def test_a_key_gives_its_picture_beside_requests_that_come_and_go(
    server: Served, client: httpx.Client, tmp_path: Path
) -> None:
    """Edits decode fewer positions than pictures, so that rows are at different ones."""
    picture = server.sampled(tmp_path / "a", CAPTIONS[0], 1, "--seed=1")[0]
    (tmp_path / "a.png").write_bytes(picture)
    bright = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    bright[4:12] = 255
    (tmp_path / "bright.png").write_bytes(encode_png(bright))
    flags = f"--image={tmp_path / 'a.png'}", f"--mask={tmp_path / 'bright.png'}"
    edited = server.sampled(tmp_path / "b", CAPTIONS[1], 2, *flags, "--seed=2", "--guidance=2")
    plain = server.sampled(tmp_path / "c", CAPTIONS[1], 2, "--seed=3", "--top-k=9")
    mask = mask_png(PIXELS, slice(4, 12), slice(0, 16))
    files = {"image": ("a.png", picture, "image/png"), "mask": ("m.png", mask, "image/png")}
    done = threading.Event()
    others: list[int] = []

    def go_on(name: int) -> None:
        while not done.is_set():
            asked = {"prompt": CAPTIONS[0], "n": 1 + name, "response_format": "b64_json"}
            more = {"files": files, "data": asked} if name else {"json": asked}
            others.append(client.post(EDIT if name else GENERATE, **more).status_code)

    threads = [threading.Thread(target=go_on, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        server.until_metric("tapir_unfinished_requests", 2)
        edit = {"prompt": CAPTIONS[1], "n": 2, "seed": 2, "guidance": 2}
        answer = client.post(EDIT, data={**edit, "response_format": "b64_json"}, files=files)
        assert pictures(answer) == edited
        asked = request(CAPTIONS[1], n=2, seed=3, top_k=9)
        for _ in range(3):
            assert pictures(client.post(GENERATE, json=asked)) == plain
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert set(others) == {200}


def test_rows_arrive_as_events(client: httpx.Client, tools: openai.OpenAI) -> None:
    asked = request(CAPTIONS[0], n=2, seed=3, stream=True, partial_images=3)
    with client.stream("POST", GENERATE, json=asked) as answer:
        lines = [x[6:] for x in answer.iter_lines() if x.startswith("data: ")]
    events = [json.loads(line) for line in lines]
    for number in (0, 1):
        mine = [each for each in events if each["candidate"] == number]
        assert [each.get("rows", 0) for each in mine] == [1, 2, 3, 0]
        assert mine[-1]["type"] == "image_generation.completed"
    whole = pictures(client.post(GENERATE, json=request(CAPTIONS[0], n=2, seed=3)))
    ends = {each["candidate"]: each["b64_json"] for each in events if "rows" not in each}
    assert [base64.b64decode(ends[i]) for i in (0, 1)] == whole
    stream = tools.images.generate(prompt=CAPTIONS[0], stream=True, partial_images=1)
    kinds = [event.type for event in stream]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]


@pytest.mark.parametrize("hostile", HOSTILE + ODD, ids=lambda hostile: hostile.name)
def test_hostile_requests_get_a_sentence(
    server: Served, client: httpx.Client, hostile: Hostile
) -> None:
    before = tree(server.temporary)
    more = {} if hostile.files or hostile.data else {"content": hostile.body}
    answer = client.request(
        hostile.method,
        hostile.path,
        headers=hostile.headers,
        files=hostile.files,
        data=hostile.data,
        **more,
    )
    assert answer.status_code in hostile.right, answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert tree(server.temporary) == before and not server.traceback()


def test_after_all_that_it_draws_the_same(
    server: Served, client: httpx.Client, tmp_path: Path
) -> None:
    """Bombs took no memory, and no path was left."""
    assert len(HOSTILE) >= 40
    assert server.peak_memory() < 300e6
    answer = client.post(GENERATE, json=request(CAPTIONS[0], n=1, seed=9))
    assert pictures(answer) == server.sampled(tmp_path, CAPTIONS[0], 1, "--seed=9")
    assert server.metric("tapir_restarts_total") == 0


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN])
def test_a_wrong_token_is_refused(server: Served, token: str) -> None:
    with server.client(headers={"authorization": token} if token else {}) as client:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert client.get(path).status_code == 401
        assert client.post(GENERATE, json=request(CAPTIONS[0])).status_code == 401
        assert client.get("/").status_code == client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example:80"}, 421),
        ({"host": "127.0.0.1@evil.example"}, 421),
        ({"host": "10.1.2.3"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_foreign_hosts_and_origins_are_refused(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    answer = client.post(GENERATE, json=request(CAPTIONS[0]), headers=headers)
    assert answer.status_code == status
    assert client.get("/", headers=headers).status_code == status


def test_a_query_chooses_no_file(client: httpx.Client) -> None:
    page = client.get("/").text
    assert "<title>Tapir" in page
    for query in ("name=../config.py", "name=/etc/passwd", "path=page.js", "kind=text/plain"):
        answer = client.get(f"/?{query}")
        assert answer.text == page and answer.headers["content-type"].startswith("text/html")


def test_a_large_upload_is_read_and_a_larger_one_refused(client: httpx.Client) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1850, 1850, 3), dtype=np.uint8)
    large = encode_png(noise)
    assert 10e6 < len(large) < 11e6
    mask = mask_png(PIXELS, slice(0, 8), slice(0, 16))
    files = {"image": ("a.png", large, "image/png"), "mask": ("m.png", mask, "image/png")}
    asked = {"prompt": CAPTIONS[0], "seed": "1"}
    assert client.post(EDIT, data=asked, files=files).status_code == 200
    files["image"] = ("a.png", large + bytes(10**6), "image/png")
    assert client.post(EDIT, data=asked, files=files).status_code == 413


def test_a_client_that_leaves_frees_its_rows(server: Served, client: httpx.Client) -> None:
    before = server.metric("tapir_pictures_total")
    asked = request(CAPTIONS[0], n=16, stream=True, partial_images=3)
    with client.stream("POST", GENERATE, json=asked) as answer:
        next(answer.iter_lines())
    server.until_metric("tapir_unfinished_requests", 0)
    server.until_metric("tapir_busy_rows", 0)
    assert server.metric("tapir_pictures_total") == before


def raw_request(**fields: object) -> bytes:
    """A whole request as bytes."""
    body = json.dumps(request(CAPTIONS[0], **fields)).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + kind).encode() + body


@contextmanager
def connected(server: Served) -> Iterator[socket.socket]:
    """A bare connection to a server, with a small buffer for its answers."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.settimeout(PATIENCE)
        own.connect((host, int(port)))
        yield own


def test_a_client_that_does_not_wait_for_its_answer_frees_its_rows(server: Served) -> None:
    with connected(server) as leaving:
        leaving.sendall(raw_request(n=16))
        server.until_metric("tapir_unfinished_requests", 1)
    server.until_metric("tapir_unfinished_requests", 0)
    server.until_metric("tapir_busy_rows", 0)
    assert not server.traceback()


def test_a_client_that_reads_byte_by_byte_holds_up_nobody(
    server: Served, client: httpx.Client
) -> None:
    with connected(server) as slow:
        slow.sendall(raw_request(n=16, stream=True, partial_images=3, size="1024x1024"))
        first = b"".join(slow.recv(1) for _ in range(12))
        assert first == b"HTTP/1.1 200"
        for _ in range(3):
            assert client.post(GENERATE, json=request(CAPTIONS[0])).status_code == 200
            assert len(slow.recv(1)) == 1
        server.until_metric("tapir_busy_rows", 0)
        server.until_metric("tapir_unfinished_requests", 0)
    assert not server.traceback()


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET //etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10**6 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(500),
        b"\0" * 10_000,
    ],
    ids=lambda sent: repr(sent[:40]),
)
def test_broken_http_holds_up_nobody(server: Served, client: httpx.Client, sent: bytes) -> None:
    with connected(server) as broken, contextlib.suppress(ConnectionError):
        broken.sendall(sent)
        assert client.get("/healthz").status_code == 200
        with contextlib.suppress(OSError):  # the server has closed it
            broken.shutdown(socket.SHUT_WR)
        status = broken.recv(12)
        assert status[:9] in (b"", b"HTTP/1.1 ") and status[9:10] in (b"", b"4"), status
    assert not server.traceback()
