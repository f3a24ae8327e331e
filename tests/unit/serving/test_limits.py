"""Limits, cancels and lost ranks: the real application, with this test as rank 0 at its socket."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from data_pipeline.images.crops import encode_png
from generation.config import ModelPaths
from serving.app import make_app
from serving.config import Limits, ServeConfig
from serving.ranks.group import RankGroup
from serving.ranks.messages import Draw, Frame, ModelFacts, packed, read_frame
from tests.harness import PATIENCE

FACTS = ModelFacts(
    pixels=16, rows=4, columns=4, text_length=8, guidance=True, ranker="CLIP", step=None
)
DRAW = Draw(
    job=0,
    caption="a",
    candidates=1,
    seed=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    guidance=1.0,
)
PNG = encode_png(np.zeros((16, 16, 3), np.uint8))
GENERATE = "/v1/images/generations"


class RankZero:
    """The other end of a group's link."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    async def frame(self) -> Frame:
        """The next frame from the server."""
        frame = await read_frame(self._reader)
        assert frame is not None
        return frame

    def draw(self, job: int, candidate: int = 0, row: int = 0, score: float = 0.5) -> None:
        body = {"job": job, "candidate": candidate, "row": row, "score": score, "codes": [1, 2]}
        self.writer.write(packed("picture", body, PNG))


Test = Callable[[httpx.AsyncClient, RankZero, RankGroup], Awaitable[None]]


def served(test: Test, folder: Path, **limits: Any) -> None:
    """Run a test against an application whose only model is ready."""

    async def run() -> None:
        config = replace(ServeConfig(), limits=Limits(**limits))
        group = RankGroup(config, "tiny", ModelPaths())
        server = await asyncio.start_unix_server(group._speak, folder / "link")
        reader, writer = await asyncio.open_unix_connection(folder / "link")
        app: Any = make_app(config, {"tiny": group}, None)
        transport = httpx.ASGITransport(app)
        async with server, httpx.AsyncClient(transport=transport, base_url="http://localhost") as c:
            assert (await c.post(GENERATE, json={"prompt": "a"})).status_code == 503
            writer.write(packed("ready", asdict(FACTS)))
            while group.state != "ready":
                await asyncio.sleep(0)
            await test(c, RankZero(reader, writer), group)
            await group.stop()
            writer.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_pictures_are_answered_best_first(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        body = {"prompt": "A cat", "n": 2, "seed": 3, "response_format": "b64_json", "codes": True}
        asked = asyncio.create_task(client.post(GENERATE, json=body))
        frame = await rank.frame()
        assert (frame.kind, frame.body["caption"], frame.body["seed"]) == ("draw", "a cat", 3)
        rank.draw(frame.body["job"], 0, score=0.1)
        rank.draw(frame.body["job"], 1, score=0.9)
        answer = (await asked).json()
        assert [each["candidate"] for each in answer["data"]] == [1, 0]
        assert answer["seed"] == 3 and answer["data"][0]["codes"] == [1, 2]
        metrics = (await client.get("/metrics")).text
        assert 'tapir_pictures_total{model="tiny"} 2.0' in metrics
        assert f'tapir_requests_total{{route="{GENERATE}",status="200"}} 1.0' in metrics
        assert group.unfinished == 0

    served(test, tmp_path)


def test_the_time_limit_cancels(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        answer = await client.post(GENERATE, json={"prompt": "a"})
        assert answer.status_code == 504
        kinds = [(await rank.frame()).kind for _ in range(2)]
        assert kinds == ["draw", "cancel"] and group.unfinished == 0

    served(test, tmp_path, seconds=0.01)


def test_more_requests_than_may_wait_are_refused(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        asked = [asyncio.create_task(client.post(GENERATE, json={"prompt": "a"})) for _ in "ab"]
        jobs = [(await rank.frame()).body["job"] for _ in asked]
        refused = await client.post(GENERATE, json={"prompt": "a"})
        assert refused.status_code == 429 and refused.headers["retry-after"]
        for job in jobs:
            rank.draw(job)
        assert [(await each).status_code for each in asked] == [200, 200]
        assert (await client.get("/healthz")).status_code == 200

    served(test, tmp_path, waiting=2)


def test_a_client_that_does_not_read_takes_no_place_of_others(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        job = group.submit(lambda number: replace(DRAW, job=number))
        await rank.frame()
        for _ in range(200):
            rank.draw(job.draw.job, row=1)
        rank.draw(job.draw.job)
        while group.unfinished:
            await asyncio.sleep(0)
        asked = asyncio.create_task(client.post(GENERATE, json={"prompt": "a"}))
        rank.draw((await rank.frame()).body["job"])
        assert (await asked).status_code == 200
        rows = [(await job.next()).row for _ in range(65)]
        assert rows == [1] * 64 + [0]
        group.finish(job)

    served(test, tmp_path, waiting=1)


def test_a_lost_link_is_answered_by_503(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        asked = asyncio.create_task(client.post(GENERATE, json={"prompt": "a"}))
        await rank.frame()
        rank.writer.close()
        assert (await asked).status_code == 503
        assert group.state == "restarting"
        assert (await client.get("/healthz")).status_code == 503
        again = await client.post(GENERATE, json={"prompt": "a"})
        assert again.status_code == 503 and "started again" in again.json()["error"]["message"]

    served(test, tmp_path)


def test_what_the_models_do_not_read_is_told_in_the_answer(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        for told in (["the prior reads 8 tokens"], []):
            asked = asyncio.create_task(client.post(GENERATE, json={"prompt": "a"}))
            job = (await rank.frame()).body["job"]
            if told:
                rank.writer.write(packed("warnings", {"job": job, "warnings": told}))
            rank.draw(job)
            assert (await asked).json()["warnings"] == told

    served(test, tmp_path)


def test_what_the_ranks_refuse_is_the_client_s_error(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        asked = asyncio.create_task(client.post(GENERATE, json={"prompt": "a"}))
        job = (await rank.frame()).body["job"]
        rank.writer.write(packed("failed", {"job": job, "message": "two rows"}))
        answer = await asked
        assert answer.status_code == 400 and answer.json()["error"]["message"] == "two rows"

    served(test, tmp_path)


def test_a_stream_ends_with_its_error(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        body = {"prompt": "a", "stream": True, "partial_images": 1}
        asked = asyncio.create_task(client.post(GENERATE, json=body))
        frame = await rank.frame()
        assert frame.body["partials"] == [2]
        rank.draw(frame.body["job"], row=2)
        await asyncio.sleep(0)
        rank.writer.close()
        events = [json.loads(x[6:]) for x in (await asked).text.splitlines() if x[:5] == "data:"]
        assert [each["type"] for each in events] == ["image_generation.partial_image", "error"]
        assert events[0]["rows"] == 2 and "score" not in events[0]

    served(test, tmp_path)


def test_names_of_models_are_known_or_an_error(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, rank: RankZero, group: RankGroup) -> None:
        wrong = await client.post(GENERATE, json={"prompt": "a", "model": "tini"})
        assert wrong.status_code == 404
        assert wrong.json()["error"] == {
            "message": "there is no model 'tini'; did you mean 'tiny'?; there are: tiny",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        }
        asked = asyncio.create_task(
            client.post(GENERATE, json={"prompt": "a", "model": "dall-e-3"})
        )
        rank.draw((await rank.frame()).body["job"])
        answer = (await asked).json()
        assert answer["model"] == "tiny"
        address = answer["data"][0]["url"]
        assert address.startswith("http://localhost/pictures/")
        assert (await client.get(address)).content == PNG
        assert (await client.get("/v1/models/tiny")).json()["rows"] == 4

    served(test, tmp_path)
