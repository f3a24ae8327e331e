"""Bodies of the images API, checked before anything is drawn; imports no torch."""

import os
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from core.errors import InputError, did_you_mean
from data_pipeline.text.captions import clean_caption
from generation.config import DrawSettings
from serving.config import Limits
from serving.ranks.group import JobError
from serving.ranks.messages import Draw, ModelFacts

MOST_SEED = 2**53 - 1
"""A browser's numbers are exact up to here."""


def _text_of_form(value: Any) -> Any:
    return None if value == "" else value


class ImageRequest(BaseModel):
    """Fields of a generation, and of an edit beside its files; those of our own come last."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str
    model: str | None = None
    n: Annotated[int | None, BeforeValidator(_text_of_form)] = None
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=256)] = None
    user: str | None = None
    background: Any = None
    input_fidelity: Any = None
    moderation: Any = None
    output_compression: Any = None
    quality: Any = None
    style: Any = None
    seed: Annotated[int | None, Field(ge=0, le=MOST_SEED)] = None
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    codes: bool = False


def parse_request(fields: Any) -> ImageRequest:
    """Check the types and bounds of a body's fields. Raises: JobError with every problem."""
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object")
    try:
        return ImageRequest.model_validate(fields)
    except ValidationError as error:
        raise bad_request("; ".join(map(_problem, error.errors()[:10]))) from None


def make_draw(
    request: ImageRequest, number: int, facts: ModelFacts, kept: tuple[int, ...] = ()
) -> Draw:
    """What the ranks draw for a checked request."""
    asked = min(request.partial_images or 0, facts.rows - 1) if request.stream else 0
    partials = {facts.rows * i // (asked + 1) for i in range(1, asked + 1)}
    assert request.seed is not None
    return Draw(
        job=number,
        caption=request.prompt,
        candidates=request.n or 1,
        seed=request.seed,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        guidance=request.guidance,
        partials=tuple(sorted(partials)),
        kept=kept,
    )


def checked(request: ImageRequest, limits: Limits, facts: ModelFacts) -> ImageRequest:
    """Clean the caption, choose a seed if none is given, and check what the model can draw.

    Raises: JobError with every problem.
    """
    problems, caption = [], request.prompt
    if len(caption) > limits.caption:
        problems.append(f"prompt: {len(caption)} characters, at most {limits.caption} are read")
    else:
        try:
            caption = clean_caption(os.fsencode(caption), "prompt")
        except (InputError, UnicodeEncodeError) as error:
            problems.append(f"prompt: {error}")
    if request.n is not None and not 1 <= request.n <= limits.most_candidates:
        problems.append(f"n: must be 1 to {limits.most_candidates}")
    settings = DrawSettings(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        guidance=request.guidance,
    )
    problems += settings.problems()
    if request.guidance != 1 and not facts.guidance:
        problems.append(
            "guidance: this prior was trained without --caption-dropout and does not know the "
            "empty caption; leave it out"
        )
    if request.top_k >= 2**31:
        problems.append("top_k: must be below 2147483648")
    try:
        side_of(request.size, facts.pixels)
    except JobError as error:
        problems.append(error.message)
    if problems:
        raise bad_request("; ".join(problems))
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    return request.model_copy(update={"prompt": caption, "seed": seed})


def side_of(size: str | None, pixels: int) -> int:
    """Side of the answered pictures: the model's own, or the square that `size` asks for.

    Raises: JobError if it is not a square of at most 1024 pixels.
    """
    if size in (None, "", "auto"):
        return pixels
    width, _, height = size.partition("x")
    if width == height and width.isascii() and width.isdigit() and len(width) <= 4:
        side = int(width)
        if 16 <= side <= max(1024, pixels):
            return side
    raise bad_request(
        f"size: must be auto ({pixels}x{pixels}) or a square of 16x16 to 1024x1024, to which the "
        "picture is enlarged"
    )


def bad_request(message: str) -> JobError:
    """Status 400."""
    return JobError(400, message, "invalid_value")


def _problem(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])[:80]
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown{did_you_mean(name, list(ImageRequest.model_fields))}"
    return f"{name}: {error['msg']}"
