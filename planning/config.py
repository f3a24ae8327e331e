"""Flags of `tapir plan`, and their problems; imports no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from core.config import expression_problems
from core.errors import InputError, did_you_mean
from models.config import ClipConfig, LoraConfig, PriorConfig
from parallel.config import CompressConfig
from planning.estimate.hardware import KNOWN, SHORT, Hardware
from training.config import DVAETrain, StageConfig
from training.presets import PRESETS
from training.tasks.dvae_config import PerceptualConfig

MOST_RANKS = 1_000_000
MOST_BATCH = 1_000_000_000
PICTURES = (".svg", ".png", ".pdf")
_SIZES = ("preset", "world", "gpu", "batch", "model", "dvae", "freeze", "lora")
_UNITS = {"network": 1e9 / 8, "link": 1e9, "memory": 1e9, "host_memory": 1e9}
"""Bytes of the units in which the flags are given."""


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """Differences of a cluster from the defaults of its GPU; 0 = the default."""

    gpus_per_node: int = 0
    """GPUs a node."""
    network: float = 0.0
    """Gbit/s that a node sends to the others."""
    link: float = 0.0
    """GB/s that a GPU sends inside a node."""
    memory: float = 0.0
    """GB a GPU."""
    host_memory: float = 0.0
    """GB of host memory per node, in which its ranks start."""
    cost_per_hour: float = 0.0
    """Dollars a GPU and hour."""

    def problems(self) -> list[str]:
        return [
            f"--{name.replace('_', '-')} {value} must be a finite number and not negative; 0 = the "
            "default"
            for name, value in vars(self).items()
            if not 0 <= value < math.inf
        ]

    def applied(self, hardware: Hardware) -> Hardware:
        """The hardware with these values in place of its own."""
        given = {name: value * _UNITS.get(name, 1) for name, value in vars(self).items() if value}
        return replace(hardware, **given)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Options of a prior, in place of the preset's, as of `tapir train prior`."""

    norm: Literal["layer", "rms"] | None = None
    """Norm of the residual stream."""
    qk_norm: bool = False
    """Divide each head's queries and keys by their root mean square."""
    positions: Literal["learned", "rotary"] | None = None
    """Learned positions of the inputs, or rotated queries and keys."""
    mlp: Literal["gelu", "gated"] | None = None
    """Two matrices, or three."""
    tied: bool = False
    """Use the token embeddings as output matrices too."""
    columns: int | None = None
    """Columns of the token grid, if they are not as many as its rows."""

    def applied(self, model: PriorConfig) -> PriorConfig:
        """The model with these options in place of its own."""
        given = {k: v for k, v in vars(self).items() if v is not None and v is not False}
        return replace(model, **given)


@dataclass(frozen=True, kw_only=True)
class DVAEFlags:
    """Options of a dVAE, in place of the preset's, as of `tapir train dvae`."""

    quantizer: Literal["gumbel", "vq", "fsq"] | None = None
    """How encoder outputs become codes."""
    codebook: int | None = None
    """Number of codes."""
    vector: int | None = None
    """vq: channels of a code's vector."""
    levels: tuple[int, ...] | None = None
    """fsq: levels of each channel; their product is the codebook."""
    perceptual_weight: Annotated[float | None, tyro.conf.arg(name="perceptual.weight")] = None
    """Above 0: with a perceptual loss."""
    discriminator_weight: Annotated[float | None, tyro.conf.arg(name="discriminator.weight")] = None
    """Above 0: with a patch discriminator."""

    def applied(self, settings: DVAETrain) -> DVAETrain:
        """The settings with these options in place of their own."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        losses = {
            name: given.pop(f"{name}_weight", None) for name in ("perceptual", "discriminator")
        }
        if self.quantizer in ("vq", "fsq"):
            given["init"] = "calibrated"  # the paper's weights suit gumbel alone
        settings = replace(settings, model=replace(settings.model, **given))
        if losses["perceptual"] is not None:
            weight = losses["perceptual"]
            perceptual = PerceptualConfig(weight=weight, vgg=_ANY_WEIGHTS if weight else None)
            settings = replace(settings, perceptual=perceptual)
        if losses["discriminator"] is not None:
            discriminator = replace(settings.discriminator, weight=losses["discriminator"])
            settings = replace(settings, discriminator=discriminator)
        return settings


_ANY_WEIGHTS = Path("vgg16")
"""A plan reads no weights."""


@dataclass(frozen=True, kw_only=True)
class ModuleFlags:
    """A torch module in place of a preset."""

    estimate: str = ""
    """FILE.py:function that returns a torch module and one rank's batch: memory and time of its
    training step."""
    mesh: str = ""
    """Of --estimate: data=N replicas, shards=M of them share weights (FSDP); by default --world
    replicas."""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """All flags of `tapir plan`."""

    preset: str = ""
    world: int = 0
    gpu: str = "h100"
    batch: int = 0
    calibration: Path | None = None
    calibrate: Path | None = None
    published: bool = False
    module: ModuleFlags = field(default_factory=ModuleFlags)
    picture: Path | None = None
    json: bool = False
    freeze: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    cluster: ClusterFlags = field(default_factory=ClusterFlags)
    model: ModelFlags = field(default_factory=ModelFlags)
    dvae: DVAEFlags = field(default_factory=DVAEFlags)

    def problems(self) -> list[str]:
        """Every problem at once."""
        if self.calibrate is not None or self.published:
            return self._unused()
        if self.module.estimate:
            return self._of_module()
        problems = self.cluster.problems() + self._sizes()
        problems += ["--mesh is of --estimate; leave it out"] if self.module.mesh else []
        if self.gpu not in KNOWN and self.gpu not in SHORT:
            problems.append(
                f"there is no hardware {self.gpu!r} (known: {', '.join([*SHORT, *KNOWN])})"
            )
        elif self.calibration is not None and self.gpu != "cpu":
            problems.append("--calibration holds constants of this machine's cores; add --gpu cpu")
        if self.picture is not None and self.picture.suffix not in PICTURES:
            problems.append(f"--picture {self.picture}: the name must end in {', '.join(PICTURES)}")
        return problems

    def _of_module(self) -> list[str]:
        """Problems of --estimate, which plans a module in place of a preset."""
        default = PlanFlags()
        names = ("preset", "batch", "model", "dvae", "freeze", "lora", "picture", "calibration")
        given = [name for name in names if getattr(self, name) != getattr(default, name)]
        problems = [f"--estimate has no use for {', '.join(given)}; leave it out"] if given else []
        if self.gpu not in KNOWN and self.gpu not in SHORT:
            problems.append(f"there is no hardware {self.gpu!r} (known: {', '.join(KNOWN)})")
        return problems + self.cluster.problems()

    def _unused(self) -> list[str]:
        """Problems of flags that --calibrate and --published do not use."""
        modes = {"calibrate": self.calibrate is not None, "published": self.published}
        if all(modes.values()):
            return ["--calibrate and --published are two commands; give one of them"]
        mode = next(name for name, asked in modes.items() if asked)
        default = PlanFlags()
        given = [
            name
            for name in (*_SIZES, "calibration", "picture", "cluster", "module")
            if getattr(self, name) != getattr(default, name)
        ]
        return [f"--{mode} has no use for {', '.join(given)}; leave it out"] if given else []

    def _sizes(self) -> list[str]:
        known, problems = plannable(), expression_problems(self.freeze, "freeze")
        if self.lora.rank < 0:
            problems.append(f"--lora.rank {self.lora.rank} must not be negative; 0 = no adapters")
        if self.lora.rank and self.preset not in PRESETS["prior"]:
            problems.append("--lora.rank is of a prior; leave it out")
        if not 0 <= self.world <= MOST_RANKS:
            problems.append(f"--world {self.world} must be 1 to {MOST_RANKS:,}; 0 = the preset's")
        if not 0 <= self.batch <= MOST_BATCH:
            problems.append(f"--batch {self.batch} must be 1 to {MOST_BATCH:,}; 0 = the preset's")
        if self.preset not in known:
            problems.append(_no_preset(self.preset))
        elif self.model != ModelFlags() and self.preset not in PRESETS["prior"]:
            problems.append(f"{self.preset} is no prior: leave its options out")
        elif self.dvae != DVAEFlags() and self.preset in PRESETS["prior"]:
            problems.append(f"{self.preset} is no dVAE: leave its options out")
        elif self.batch > 0:
            problems += _undealt(known[self.preset](), self.batch)
        return problems


def plannable() -> dict[str, Callable[[], StageConfig]]:
    """Presets of `plan`: all of the prior, and those of the dVAE with other names."""
    return {**PRESETS["dvae"], **PRESETS["prior"]}


def _no_preset(name: str) -> str:
    known = plannable()
    hint = did_you_mean(name, known)
    return f"there is no preset {name!r} of a prior or dVAE{hint} (known: {', '.join(known)})"


def _undealt(settings: StageConfig, batch: int) -> list[str]:
    lanes = settings.order.lanes
    if batch % lanes == 0:
        return []
    near = max(1, round(batch / lanes)) * lanes
    return [f"--batch {batch} is not a multiple of the preset's order.lanes={lanes}; try {near}"]


_FAMILIES = {"tiny": ("tiny", "tiny"), "small": ("small", "paper_bpe")}
"""Preset -> presets of the dVAE and the tokenizer that make its data; others: the paper's."""


def filled(preset: str, settings: StageConfig) -> Any:
    """Fill vocabulary and grid from the matching dVAE and BPE presets."""
    model: Any = settings.model  # type: ignore[attr-defined]
    dvae_name, bpe_name = _FAMILIES.get(preset, ("paper_dvae", "paper_bpe"))
    dvae, bpe = PRESETS["dvae"][dvae_name]().model, PRESETS["bpe"][bpe_name]()
    if isinstance(model, PriorConfig | ClipConfig):
        model = replace(model, text_vocabulary=model.text_vocabulary or bpe.vocabulary)
    if isinstance(model, PriorConfig):
        codes, grid = model.image_vocabulary or dvae.codebook, model.grid or dvae.grid
        model = replace(model, image_vocabulary=codes, grid=grid)
    return replace(settings, model=model)  # type: ignore[call-arg]


def settings_of(
    preset: str, batch: int = 0, freeze: str = "", lora: LoraConfig | None = None
) -> Any:
    """A preset of a prior, with the vocabularies and grid of its data, or of a dVAE.

    Adapters take the preset's place of compression, and are planned for any base.

    Raises: InputError for an unknown preset.
    """
    known = plannable()
    if preset not in known:
        raise InputError(_no_preset(preset))
    settings = filled(preset, known[preset]())
    loop = replace(settings.loop, global_batch_size=batch or settings.loop.global_batch_size)
    settings = replace(settings, loop=loop, freeze=freeze)
    if lora is None or lora.rank == 0:
        return settings
    return replace(settings, lora=lora, init=_ANY_BASE, compress=CompressConfig())


_ANY_BASE = "base"
"""A plan reads no weights."""
