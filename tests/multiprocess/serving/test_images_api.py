"""The images API of a real server: its pictures are those of `tapir sample`, and it withstands."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from data_pipeline.images.crops import encode_png
from tests.multiprocess.serving.hostile_requests import HOSTILE, Hostile
from tests.multiprocess.serving.served import CAPTIONS, TOKEN, Served, mask_png, served
from tests.unit.finished import PIXELS

pytestmark = pytest.mark.world
GENERATE = "/v1/images/generations"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    flags = f"--token-file={folder / 'token'}", "--rows=4", "--upload-mb=11"
    with served(folder, *flags) as running:
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
    assert [model.id for model in tools.models.list()] == ["tiny"]


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


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_requests_get_a_sentence(client: httpx.Client, hostile: Hostile) -> None:
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
    assert answer.json()["error"]["message"]


def test_after_all_that_it_draws_the_same(
    server: Served, client: httpx.Client, tmp_path: Path
) -> None:
    assert len(HOSTILE) >= 40
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
    assert client.post("/v1/images/edits", data=asked, files=files).status_code == 200
    files["image"] = ("a.png", large + bytes(10**6), "image/png")
    assert client.post("/v1/images/edits", data=asked, files=files).status_code == 413


def test_a_client_that_leaves_frees_its_rows(server: Served, client: httpx.Client) -> None:
    before = server.metric("tapir_pictures_total")
    asked = request(CAPTIONS[0], n=16, stream=True, partial_images=3)
    with client.stream("POST", GENERATE, json=asked) as answer:
        next(answer.iter_lines())
    server.until_metric("tapir_unfinished_requests", 0)
    server.until_metric("tapir_busy_rows", 0)
    assert server.metric("tapir_pictures_total") == before


def test_a_client_that_sends_half_a_request_holds_up_nobody(
    server: Served, client: httpx.Client
) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n")
        assert client.post(GENERATE, json=request(CAPTIONS[0])).status_code == 200
