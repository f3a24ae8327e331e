"""The kinds of image tokenizers that can be imported: Tapir's own, and those of plug-ins.

A package adds kinds by entry points of the group `tapir.tokenizers`; each loads a TokenizerKind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from torch import Tensor

from core.config import from_json, wrong_types
from core.errors import ConfigError, InputError, did_you_mean
from models.tokenizers import kinds
from models.tokenizers.config import (
    ReadOptions,
    TokenizerConfig,
    TokenizerFacts,
    TokenizerSizes,
    VQConfig,
)
from models.tokenizers.protocol import TokenizerNetwork
from models.tokenizers.vq import VQNetwork

GROUP = "tapir.tokenizers"


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """How tokenizers of one origin are recognised, read and built."""

    config: type
    """Frozen dataclass of JSON values with the properties of TokenizerSizes."""
    build: Callable[[Any], TokenizerNetwork]
    """The network of a config, with any weights."""
    matches: Callable[[Path], bool]
    """True if a file or folder of another project is of this kind; raises only InputError, which
    the user sees if no other kind matches."""
    read: Callable[[Path, ReadOptions], tuple[TokenizerSizes, Mapping[str, Tensor]]]
    """Config and fp32 weights, by parameter name, of another project's file or folder."""


KINDS: dict[str, TokenizerKind] = {
    name: TokenizerKind(config=VQConfig, build=VQNetwork, matches=matches, read=read)
    for name, matches, read in (
        ("diffusers", kinds.is_diffusers, kinds.read_diffusers),
        ("taming", partial(kinds.has, name=kinds.TAMING), kinds.read_taming),
        ("llamagen", partial(kinds.has, name=kinds.LLAMAGEN), kinds.read_llamagen),
    )
}


def known_kinds() -> list[str]:
    """Names of all kinds, including those of plug-ins, which are not loaded."""
    return [*KINDS, *sorted(_plug_ins())]


def kind_of(name: str) -> TokenizerKind:
    """A kind by its name; imports its plug-in.

    Raises: ConfigError if there is none, or its plug-in cannot be loaded.
    """
    if name in KINDS:
        return KINDS[name]
    plug_ins = _plug_ins()
    if name not in plug_ins:
        known = known_kinds()
        raise ConfigError(
            f"no installed package has an image tokenizer {name!r}{did_you_mean(name, known)} "
            f"(known: {', '.join(known)}); install the one that registers it as an entry "
            f"point of {GROUP}"
        )
    return _loaded(plug_ins[name])


def recognised(path: Path) -> str:
    """Name of the first kind that a file or folder is of.

    Raises: InputError if there is none, it cannot be read, or it is of no kind.
    """
    if not path.exists():
        raise InputError(f"there is no {path}; give the file or folder of an image tokenizer")
    reasons = []
    for name in known_kinds():
        try:
            if kind_of(name).matches(path):
                return name
        except InputError as error:
            reasons.append(error)
    if reasons:
        raise reasons[0]
    raise InputError(
        f"{path} holds none of the tokenizers that Tapir knows ({', '.join(known_kinds())}); name "
        "its kind by --from, or install the package that reads it"
    )


def sizes_of(config: TokenizerConfig) -> TokenizerSizes:
    """The sizes of an imported tokenizer. Raises: ConfigError for fields that its kind lacks."""
    sizes: TokenizerSizes = from_json(kind_of(config.kind).config, config.sizes)
    return sizes


def size_problems(config: TokenizerConfig) -> list[str]:
    """All problems of an imported tokenizer's sizes. Raises: ConfigError for an unknown kind."""
    if wrong := wrong_types(kind_of(config.kind).config, config.sizes, "sizes"):
        return wrong
    sizes = sizes_of(config)
    return sizes.problems() or TokenizerFacts.of(config.kind, sizes, "").problems()


def build_tokenizer(config: TokenizerConfig) -> TokenizerNetwork:
    """The network of an imported tokenizer, with any weights.

    Raises: ConfigError if it has buffers, which Tapir does not store.
    """
    network = kind_of(config.kind).build(sizes_of(config))
    if buffers := network.state_dict().keys() - dict(network.named_parameters()):
        raise ConfigError(
            f"the network of the tokenizer {config.kind} has buffers ({sorted(buffers)[0]}); make "
            "them parameters, or register them with persistent=False"
        )
    return network


def _plug_ins() -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group=GROUP) if each.name not in KINDS}


def _loaded(plug_in: EntryPoint) -> TokenizerKind:
    package = plug_in.dist.name if plug_in.dist else plug_in.value
    try:
        kind = plug_in.load()
    except Exception as error:  # whatever the import of somebody else's module raises
        raise ConfigError(
            f"the image tokenizer {plug_in.name} of the package {package} cannot be loaded: "
            f"{type(error).__name__}: {error}; mend or uninstall it"
        ) from error
    if not isinstance(kind, TokenizerKind):
        raise ConfigError(
            f"the entry point {plug_in.name} of the package {package} is a {type(kind).__name__}, "
            "and must be a TokenizerKind of models.tokenizers.registry"
        )
    return kind
