"""One server's models, limits and pictures, and how a request gets its pictures from the ranks."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping

from core.errors import did_you_mean
from serving.config import Limits
from serving.metrics import Metrics
from serving.pictures import Pictures
from serving.ranks.group import Drawn, JobError, RankGroup
from serving.ranks.messages import ModelFacts
from serving.requests import ImageRequest, checked, make_draw
from serving.uploads import ImagePrompt, Uploads

ALIASES = ("dall-e-2", "dall-e-3", "gpt-image-1")
"""Names that tools send unless told otherwise; they mean the default model."""


class Service:
    """What the routes share."""

    def __init__(self, groups: Mapping[str, RankGroup], limits: Limits) -> None:
        """`groups` by name; the first one is the default."""
        self.groups, self.limits = groups, limits
        self.metrics = Metrics(groups)
        self.pictures = Pictures(limits.pictures_kept)
        self.uploads = Uploads(limits.megapixels)
        self.started = int(time.time())

    def group(self, name: str | None) -> RankGroup:
        """The model of a request. Raises: JobError if there is none of that name."""
        if name is None or (name in ALIASES and name not in self.groups):
            return next(iter(self.groups.values()))
        if name not in self.groups:
            names = ", ".join(self.groups)
            message = f"there is no model {name[:80]!r}{did_you_mean(name[:80], self.groups)}"
            raise JobError(404, f"{message}; there are: {names}", "model_not_found")
        return self.groups[name]

    def facts(self, group: RankGroup) -> ModelFacts:
        """Facts of a model that is ready. Raises: JobError if it is not."""
        if group.facts is None or group.state != "ready":
            raise group.unavailable()
        return group.facts

    def checked(self, request: ImageRequest, group: RankGroup) -> ImageRequest:
        """A request that the model can draw. Raises: JobError with every problem."""
        return checked(request, self.limits, self.facts(group))

    async def draw(
        self, group: RankGroup, request: ImageRequest, prompt: ImagePrompt | None = None
    ) -> AsyncGenerator[Drawn, None]:
        """The pictures of a checked request as they arrive, unfinished ones if it streams.

        Leaving the iteration cancels what is not drawn. Raises: JobError.
        """
        kept, pixels = (prompt.kept, prompt.pixels) if prompt is not None else ((), b"")
        facts, began = self.facts(group), time.monotonic()
        job = group.submit(lambda number: make_draw(request, number, facts, kept), pixels)
        left = job.draw.candidates
        try:
            while left:
                rest = self.limits.seconds - (time.monotonic() - began)
                drawn = await asyncio.wait_for(job.next(), rest)
                left -= not drawn.row
                yield drawn
        except TimeoutError:
            message = f"the pictures took longer than {self.limits.seconds:g} s, the time limit"
            raise JobError(504, message, "timeout") from None
        finally:
            group.finish(job)
        self.metrics.drawn(group.name, job.draw.candidates, time.monotonic() - began)
