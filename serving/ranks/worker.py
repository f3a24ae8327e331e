"""The loop of a model's ranks: rank 0 takes requests from the server, all ranks decode them."""

import json
import queue
import socket
import threading
from dataclasses import asdict

import numpy as np
import torch

from core.config import check, from_json
from core.heartbeat import Heart
from core.stop import heed_stop_signals
from data_pipeline.text.bpe import encode
from data_pipeline.text.words import KnownWords, load_words
from generation.config import DrawSettings
from generation.sampling.running import Candidate, RunningBatch
from generation.sampling.sampler import Prompt
from generation.text_to_image import Studio, open_studio
from parallel.mesh import Mesh, build_mesh, own_mesh
from parallel.world import join_world, leave_world
from serving.models import rows_problems
from serving.ranks.messages import (
    Draw,
    Frame,
    ModelFacts,
    RankSettings,
    packed,
    receive_frame,
)
from serving.ranks.pixels import Picture, PixelDecoder
from serving.ranks.schedule import Job, Schedule
from training.tasks.task import pad_text

IDLE = 10.0
"""Seconds between two steps without candidates, by which other ranks know that rank 0 lives."""
_PATIENCE = 16
"""A finished picture waits for others for at most 1 / this of a picture's steps."""


def rank_main(payload: str) -> None:
    """Entry point of one rank."""
    settings = from_json(RankSettings, json.loads(payload))
    heed_stop_signals()
    world = join_world()
    try:
        mesh = own_mesh(settings.number) if world.size == 1 else build_mesh(settings.mesh, world)
        _serve(settings, mesh)
    finally:
        leave_world(world)


def _serve(settings: RankSettings, mesh: Mesh) -> None:
    rank, rows = mesh.world.rank, settings.rows
    studio = open_studio(
        settings.models,
        settings.precision,
        mesh,
        one_row=rows == 1,
        rerank=settings.rerank and rank == 0,
    )
    check(rows_problems(rows, studio.caption_dropout))
    batch = RunningBatch(studio.sampler.decoder, rows)
    if rank:
        batch.follow()
        return
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(settings.link)
        link.sendall(packed("ready", asdict(_facts(studio, settings))))
        _Worker(studio, batch, link, load_words(settings.models.bpe)).run()


def _facts(studio: Studio, settings: RankSettings) -> ModelFacts:
    config = studio.sampler.config
    return ModelFacts(
        pixels=studio.images.facts.pixels,
        rows=config.grid,
        columns=config.grid_columns,
        text_length=config.text_length,
        guidance=studio.caption_dropout > 0,
        ranker="" if studio.ranker is None else studio.ranker.name,
        step=settings.models.step,
    )


class _Worker:
    """Rank 0's loop: requests in, one step, pictures out."""

    def __init__(
        self, studio: Studio, batch: RunningBatch, link: socket.socket, words: KnownWords | None
    ) -> None:
        self._studio, self._batch, self._link, self._words = studio, batch, link, words
        self._schedule = Schedule(batch, self._candidate)
        patience = max(1, studio.sampler.config.image_length // _PATIENCE)
        self._pixels = PixelDecoder(studio, patience)
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._heart, self._steps, self._told = Heart(0), 0, (-1, -1)
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self) -> None:
        """Serve until the server closes the link."""
        while self._take_frames():
            self._heart.beat("decoding", self._steps)
            self._steps += 1
            for advance in self._schedule.step():
                self._pixels.add(advance)
            for picture in self._pixels.take(self._schedule.idle):
                self._send(picture)
            self._tell_load()
        self._batch.close()

    def _listen(self) -> None:
        frame: Frame | None = Frame(kind="", body={})
        while frame is not None:
            frame = receive_frame(self._link)
            self._frames.put(frame)

    def _take_frames(self) -> bool:
        """Handle all frames that have arrived; waits for one if there is nothing to decode."""
        wait = self._schedule.idle
        while True:
            try:
                frame = self._frames.get(block=wait, timeout=IDLE if wait else None)
            except queue.Empty:
                return True
            wait = False
            if frame is None or frame.kind == "close":
                return False
            if frame.kind == "cancel":
                self._schedule.cancel(frame.body["job"])
                self._pixels.drop(frame.body["job"])
            else:
                self._begin(from_json(Draw, dict(frame.body)), frame.blobs)

    def _begin(self, draw: Draw, blobs: tuple[bytes, ...]) -> None:
        settings = DrawSettings(
            candidates=draw.candidates,
            seed=draw.seed,
            temperature=draw.temperature,
            top_k=draw.top_k,
            top_p=draw.top_p,
            guidance=draw.guidance,
        )
        job = Job(draw=draw, settings=settings, prompt=self._prompt(draw, blobs))
        if problem := self._problem(job):
            self._link.sendall(packed("failed", {"job": draw.job, "message": problem}))
            return
        if warnings := self._warnings(draw.caption):
            self._link.sendall(packed("warnings", {"job": draw.job, "warnings": warnings}))
        self._schedule.add(job)

    def _warnings(self, caption: str) -> list[str]:
        """What of a caption the models do not read or know, for the person who wrote it."""
        warnings = self._studio.unread(caption)
        if self._words is not None and (unknown := self._words.unknown(caption)):
            warnings.append(self._words.brief(unknown))
        return warnings

    def _problem(self, job: Job) -> str:
        """Why a request cannot be drawn, however long it waits; "" if it can."""
        return "; ".join(self._candidate(job, 0).problems(self._studio.sampler.config))

    def _prompt(self, draw: Draw, blobs: tuple[bytes, ...]) -> Prompt | None:
        if not draw.kept:
            return None
        side = self._studio.images.facts.pixels
        image = np.frombuffer(blobs[0], np.uint8).reshape(side, side, 3)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        kept = torch.tensor(draw.kept, dtype=torch.bool, device="cpu")
        return Prompt(codes=self._studio.encode(pixels)[0], kept=kept)

    def _candidate(self, job: Job, number: int) -> Candidate:
        length = self._studio.sampler.config.text_length
        text = pad_text([encode(self._studio.tokenizer, job.draw.caption)], length)[0]
        key = (job.draw.seed, job.draw.caption, number)
        return Candidate(text=text, key=key, settings=job.settings, prompt=job.prompt)

    def _send(self, picture: Picture) -> None:
        body = {
            "job": picture.job.draw.job,
            "candidate": picture.candidate,
            "row": picture.row,
            "score": picture.score,
            "codes": picture.codes.tolist(),
        }
        self._link.sendall(packed("picture", body, picture.png))

    def _tell_load(self) -> None:
        load = self._schedule.busy_rows, self._schedule.waiting
        if load != self._told:
            self._told = load
            self._link.sendall(packed("load", {"rows": load[0], "waiting": load[1]}))
