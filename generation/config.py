"""Settings of sampling, of evaluation and of the overlap pass; imports no torch."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import tyro

from parallel.config import MeshConfig

_LEAST_TEMPERATURE, _MOST_GUIDANCE = 0.001, 100
"""Beyond them, logits overflow."""
_TOGETHER, _FEW_ROWS, _MOST_GUESSES = 8, 8, 63
"""Codes of a pass for few rows; what few rows are; the largest --speculate."""


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """Settings of `tapir overlap`: pairs whose picture is also in an evaluation set."""

    threshold: float = 0.98
    """Minimum cosine of CLIP embeddings at which a picture counts as one of the evaluation set."""
    batch: int = 64
    """Pictures embedded together."""

    def problems(self) -> list[str]:
        if not 0 < self.threshold <= 1 or self.batch < 1:
            return ["threshold must be in (0, 1], and batch at least 1"]
        return []


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """Sampling settings that determine each candidate's codes, whatever the batch."""

    candidates: int = 16
    """Pictures drawn for a caption, before reranking."""
    temperature: float = 1.0
    """Divides the logits; 0 = the most likely code."""
    top_k: int = 0
    """Most likely codes that may be drawn at each position; 0 = all."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the most likely codes whose probabilities add up to
    this; 1 = all."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, from the empty caption's logits (0) to the caption's
    (1, no guidance) and beyond. The prior must have been trained with --caption-dropout."""
    seed: int = 0
    """Seed of the draws; candidate c of a caption is the same whatever the batch."""

    def problems(self) -> list[str]:
        few = ["candidates must be at least 1"] if self.candidates < 1 else []
        return few + self._out_of_range()

    def _out_of_range(self) -> list[str]:
        problems = []
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature <= 1000:
            problems.append(
                f"temperature={self.temperature} must be 0 (the most likely code) or "
                f"{_LEAST_TEMPERATURE} to 1000"
            )
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must not be negative; 0 allows every code")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be in (0, 1]; 1 allows every code")
        if not 0 <= self.guidance <= _MOST_GUIDANCE:
            problems.append(
                f"guidance={self.guidance} must be 0 to {_MOST_GUIDANCE}; 1 is none, try 2 to 5"
            )
        return problems


BATCH = 128
"""Default number of candidates decoded together."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawSettings):
    """How candidates are drawn."""

    batch: int = BATCH
    """Candidates decoded together."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of the prior's matmuls. In fp32 a seed gives the same picture in every batch; bf16 is faster
    and may give another one; int8: weights in 8 bits, half of the reads again."""

    @property
    def draws(self) -> DrawSettings:
        """The part that decides the codes; batch and precision go to the opened models."""
        return DrawSettings(**{x.name: getattr(self, x.name) for x in fields(DrawSettings)})

    def problems(self) -> list[str]:
        few = min(self.candidates, self.batch) < 1
        return ["candidates and batch must be at least 1"] * few + self._out_of_range()

    def rows(self, captions: int) -> int:
        """Rows that the prior decodes together, at most: with guidance two a candidate."""
        return min(self.batch, captions * self.candidates) * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Which tokens of an image prompt are kept; the others are drawn in raster order."""

    image: Path | None = None
    """Image prompt, PNG or JPEG; some of its tokens are kept, the others are drawn."""
    keep_rows: int = 0
    """Rows of tokens kept at the top (the paper: 15 of 32)."""
    keep: tuple[str, ...] = ()
    """Rectangles of tokens kept, as ROWS,COLUMNS, each START:END without END: 0:4,2:8"""
    redraw: tuple[str, ...] = ()
    """Rectangles of tokens drawn again; without --keep and --keep-rows all others are kept."""
    mask: Path | None = None
    """Mask picture: tokens under bright pixels are drawn again, those under dark ones are kept."""

    @property
    def asked(self) -> bool:
        return bool(self.keep_rows or self.keep or self.redraw or self.mask)

    def problems(self) -> list[str]:
        problems = []
        if (self.image is None) == self.asked:
            problems.append(
                "an image prompt needs --image and one of --keep-rows, --keep, --redraw and --mask:"
                " give both, or neither"
            )
        if self.keep_rows < 0:
            problems.append("keep_rows must not be negative")
        return problems


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Run folders of the models. Without them `tapir sample` takes the newest set of your own in
    runs/ or a folder in it, e.g. runs/demo, else shipped models."""

    prior: Path | None = None
    """Run folder of a prior; an unfinished run gives its newest checkpoint."""
    step: int | None = None
    """Take the prior's checkpoint of this step."""
    dvae: Path | None = None
    """Run folder of the dVAE, or of another image tokenizer, that the prior was trained on; by
    default beside the prior."""
    clip: Path | None = None
    """Run folder of a CLIP, or a folder with an open_clip checkpoint (open_clip_config.json and
    open_clip_model.safetensors); by default beside the prior."""
    bpe: Path | None = None
    """Folder of tokenizer.json; by default beside the prior."""

    @property
    def asked(self) -> bool:
        return any(value is not None for value in vars(self).values())

    @property
    def paths(self) -> "ModelPaths":
        """All folders; those not given are beside the prior if they exist, else in runs/."""
        usual = ModelPaths()
        prior = self.prior or usual.prior

        def folder(given: Path | None, default: Path) -> Path:
            beside = prior.with_name(default.name)
            return given or (beside if beside.exists() else default)

        return ModelPaths(
            prior=prior,
            step=self.step,
            dvae=folder(self.dvae, usual.dvae),
            clip=folder(self.clip, usual.clip),
            bpe=folder(self.bpe, usual.bpe),
        )


@dataclass(frozen=True, kw_only=True)
class ModelPaths(ModelChoice):
    """Run folders of the models."""

    prior: Path = Path("runs/prior")
    """Run folder of a prior; an unfinished run gives its newest checkpoint."""
    step: int | None = None
    """Take the prior's checkpoint of this step."""
    dvae: Path = Path("runs/dvae")
    """Run folder of the dVAE, or of another image tokenizer, that the prior was trained on."""
    clip: Path = Path("runs/clip")
    """Run folder of a CLIP, or a folder with an open_clip checkpoint (open_clip_config.json and
    open_clip_model.safetensors)."""
    bpe: Path = Path("runs/bpe")
    """Folder of tokenizer.json."""


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """Settings of `tapir sample`."""

    captions: tyro.conf.Positional[tuple[str, ...]]
    """One or more captions, each in quotes."""
    out: Path | None = None
    """PNG to write: the best candidates, one row per caption; by default runs/samples/CAPTION.png.
    """
    weights: str = ""
    """Draw with these shipped models, shapes or emoji, whatever is in runs/."""
    show: int = 8
    """Best candidates in each row."""
    pictures: Path | None = None
    """Folder to which each candidate is written as a PNG as soon as it is finished."""
    rerank: bool = True
    """Rank by CLIP; without it, the candidates stay in the order in which they were drawn."""
    follow: bool = False
    """Draw from every checkpoint of a prior in training until it is finished, and add the pictures
    to its TensorBoard."""
    tensor: int = 1
    """Tensor-parallel ranks, for a prior that is too large for one process."""
    pipeline: int = 1
    """Pipeline stages of the prior."""
    models: ModelChoice = field(default_factory=ModelChoice)
    """Run folders of the models."""
    keep: PromptConfig = field(default_factory=PromptConfig)
    """Image prompt, and which of its tokens are kept."""
    draw: SampleConfig = field(default_factory=SampleConfig)
    """How candidates are drawn."""
    speculate: int | Literal["auto"] = "auto"
    """Codes after the next one that are guessed and checked in the same pass (speculative
    decoding): fewer passes, in fp32 the same pictures. 0 = none; auto = 7 for at most 8 rows on one
    CPU rank, else none."""

    @property
    def mesh(self) -> MeshConfig:
        return MeshConfig(tensor=self.tensor, pipeline=self.pipeline)

    def together(self, captions: int, device: str) -> int:
        """Codes of a candidate that are decoded in one pass on a kind of device."""
        if self.speculate != "auto":
            return 1 + self.speculate
        rows = self.draw.rows(captions)
        return _TOGETHER if rows <= _FEW_ROWS and device == "cpu" and self.mesh.world == 1 else 1

    def problems(self) -> list[str]:
        problems = [*self.draw.problems(), *self.keep.problems()]
        if not self.captions or self.show < 1:
            problems.append("give at least one caption in quotes, and a --show of at least 1")
        if self.weights and self.models.asked:
            problems.append(
                "--weights names shipped models: leave out --prior, --step, --dvae, --clip, --bpe"
            )
        if self.weights and self.follow:
            problems.append("--follow draws from a prior in training: give --prior, not --weights")
        if self.follow and (self.models.step is not None or self.pictures is not None):
            problems.append("--follow draws from all checkpoints; leave out --step and --pictures")
        if min(self.tensor, self.pipeline) < 1:
            problems.append("tensor and pipeline must be at least 1")
        if self.speculate != "auto" and not 0 <= self.speculate <= _MOST_GUESSES:
            problems.append(f"speculate={self.speculate} must be auto, or 0 to {_MOST_GUESSES}")
        if self.speculate not in ("auto", 0) and self.pipeline > 1:
            problems.append("--speculate needs a prior in one stage: leave out --pipeline")
        return problems


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SampleConfig):
    """Settings of `tapir evaluate`."""

    prompts: int = 256
    """Held-out captions to draw for, at most."""
    max_candidates: int = 0
    """Candidates of the first captions, for best-of-N above `candidates`; 0 = `candidates`."""
    max_candidates_prompts: int = 64
    """Captions that get `max_candidates`."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
    """Guidance scales at which single samples are measured, if the prior was trained for it."""
    guidance_prompts: int = 0
    """Captions on which the guidance scales are measured; 0 = all."""

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.prompts < 1:
            problems.append("prompts must be at least 1")
        if self.guidance_prompts < 0:
            problems.append(
                f"guidance_prompts={self.guidance_prompts} must not be negative; 0 = all captions"
            )
        if self.max_candidates_prompts < 1:
            problems.append(
                f"max_candidates_prompts={self.max_candidates_prompts} must be at least 1"
            )
        if self.max_candidates != 0 and self.max_candidates < self.candidates:
            problems.append(
                f"max_candidates={self.max_candidates} must be 0 or at least candidates="
                f"{self.candidates}, which every caption gets"
            )
        if not all(0 <= scale <= _MOST_GUIDANCE for scale in self.guidance_scales):
            problems.append(f"guidance_scales must be 0 to {_MOST_GUIDANCE}")
        return problems


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(SampleConfig):
    """Settings of `tapir score`: how pictures are drawn and compared."""

    captions: int = 0
    """Captions to draw pictures for, chosen by --seed; 0 = 30000 of MS-COCO, all of other sets."""
    radii: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    """Gaussian blurs of both sets: standard deviations in pixels of the drawn pictures."""
    block: int = 64
    """Captions, or real pictures, per block: what a worker computes and stores at a time."""

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.captions < 0 or self.block < 1:
            problems.append("captions must not be negative, and block be at least 1")
        if not self.radii or not all(0 <= radius < math.inf for radius in self.radii):
            problems.append("radii must be one or more numbers that are not negative")
        elif len(set(self.radii)) < len(self.radii):
            problems.append("radii must differ from one another")
        return problems
