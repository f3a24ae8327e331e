"""Settings of `tapir serve`; imports no torch."""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from core.errors import InputError
from generation.config import ModelChoice, ModelPaths
from parallel.config import MeshConfig

TOKEN_VARIABLE = "TAPIR_TOKEN"
DEFAULT_MODEL = "tapir"
"""Name of the models of --prior, --dvae, --clip and --bpe, and of the newest own ones."""
_SHORTEST_TOKEN = 16
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(.+)")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server accepts; everything beyond is refused with a sentence."""

    most_candidates: int = 16
    """Pictures that one request may draw."""
    waiting: int = 128
    """Requests that may wait for rows of the batch; further ones get status 429."""
    seconds: float = 300.0
    """Time limit of a request, waiting included; then status 504. Also of a client to read a part
    of its answer."""
    upload_mb: float = 16.0
    """Size of a request's body in MB."""
    upload_seconds: float = 30.0
    """Time in which a request's body must arrive."""
    megapixels: float = 16.0
    """Size of an uploaded picture, read from its header before it is decoded."""
    caption: int = 4000
    """Characters of a caption."""
    pictures_kept: int = 256
    """Finished pictures that are kept in memory for their `url`."""

    def problems(self) -> list[str]:
        least = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return [f"{name}={value} must be above 0" for name, value in least.items() if not value > 0]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `tapir serve`."""

    named: tyro.conf.Positional[tuple[str, ...]] = ()
    """Models by name, NAME=FOLDER: a folder with prior, dvae, clip and bpe, like a demo's. Without
    any, the models of --prior, --dvae, --clip and --bpe are served as `tapir`; without those too,
    the newest set of your own in runs/ or a folder in it, else all shipped models by their names.
    """
    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs a token: the variable
    TAPIR_TOKEN or --token-file."""
    port: int = 8000
    """Port to listen on; 0 = a free one."""
    token_file: Path | None = None
    """File with the token that clients send as their API key."""
    hosts: tuple[str, ...] = ()
    """Names of this server that clients use beside addresses and localhost, e.g. of a proxy."""
    rows: int = 16
    """Rows decoded together; a candidate takes one, with guidance two, so that priors trained for
    guidance need two."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of the prior's matmuls. In fp32 a key gives the same picture in every batch; int8: weights
    in 8 bits."""
    tensor: int = 1
    """Tensor-parallel ranks of each prior."""
    pipeline: int = 1
    """Pipeline stages of each prior."""
    rerank: bool = True
    """Rank a request's pictures by CLIP."""
    models: ModelChoice = field(default_factory=ModelChoice)
    """Run folders of the models."""
    limits: Limits = field(default_factory=Limits)
    """What the server accepts."""

    @property
    def mesh(self) -> MeshConfig:
        return MeshConfig(tensor=self.tensor, pipeline=self.pipeline)

    def paths(self) -> dict[str, ModelPaths]:
        """Run folders by name of the models in the settings; the first one is the default."""
        matches = [match for text in self.named if (match := _NAMED.fullmatch(text))]
        folders = {match[1]: Path(match[2]) for match in matches}
        named = {
            name: ModelPaths(
                prior=folder / "prior",
                dvae=folder / "dvae",
                clip=folder / "clip",
                bpe=folder / "bpe",
            )
            for name, folder in folders.items()
        }
        if not named and self.models.asked:
            return {DEFAULT_MODEL: self.models.paths}
        return named

    def problems(self) -> list[str]:
        problems = self.limits.problems()
        wrong = [text for text in self.named if not _NAMED.fullmatch(text)]
        problems += [f"{text!r}: name models as NAME=FOLDER" for text in wrong]
        if not wrong and len(self.paths()) < len(self.named):
            problems.append("two models have the same name: give each another one")
        if self.named and self.models.asked:
            problems.append(
                "NAME=FOLDER names whole folders: leave out --prior, --step, --dvae, --clip and "
                "--bpe"
            )
        if not 0 <= self.port < 2**16:
            problems.append(f"port={self.port} must be 0 to 65535; 0 is a free one")
        problems += [
            f"hosts: {name!r} is not the name of a host, without scheme and port"
            for name in self.hosts
            if not _HOST.fullmatch(name)
        ]
        if min(self.rows, self.tensor, self.pipeline) < 1:
            problems.append("rows, tensor and pipeline must be at least 1")
        return problems


def token_of(
    host: str, token_file: Path | None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """The token that clients must send; None if there is none, which only loopback may have.

    Raises: InputError if it is missing, unreadable or too short.
    """
    token = environment.get(TOKEN_VARIABLE, "").strip()
    if token_file is not None:
        try:
            token = token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {token_file} cannot be read: {error}") from error
    if not token:
        if not is_loopback(host) or token_file is not None:
            raise InputError(
                f"listening on {host}, where other machines reach it, needs a token: put one into "
                f"a file (openssl rand -hex 24 > token) and give --token-file token, or set "
                f"{TOKEN_VARIABLE}"
            )
        return None
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise InputError(
            f"the token must be at least {_SHORTEST_TOKEN} ASCII characters without line breaks: "
            "openssl rand -hex 24 makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """True if only this machine reaches an address: 127.0.0.0/8, ::1, localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
