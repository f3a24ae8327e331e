"""Settings of the training stages, composed of other packages' settings; imports no torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from checkpoint.config import CheckpointConfig
from cluster.config import SupervisorConfig
from core.config import expression_problems, folder_problems, place_problems
from core.storage.mixture import data_sets, mixture_problems
from data_pipeline.config import LoaderConfig, OrderConfig
from models.config import ClipConfig, DVAEConfig, LoraConfig, PriorConfig
from parallel.config import CompressConfig, EngineConfig, MeshConfig, ModelSizes, OptimConfig
from training.profiling.categories import ProfileConfig
from training.recovery.config import GuardConfig
from training.run.resume_with import resume_with_problems
from training.run.trackers.config import track_problems
from training.tasks.dvae_config import DiscriminatorConfig, PerceptualConfig


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of the run, and intervals of logging and validation."""

    steps: int = 1000
    """Optimiser steps of the whole run."""
    stop_at: int = 0
    """Stop after this step with a checkpoint; the run can be resumed later on any mesh; 0 = train
    all steps."""
    global_batch_size: int = 64
    """Samples per step over all ranks."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    validate_every: int = 200
    """Steps between validations; 0 = only at the end."""
    validation_samples: int = 512
    """Held-out samples per validation: at least order.lanes, rounded down to a multiple of it, so
    that the replicas of every mesh share the same samples equally."""

    @property
    def end(self) -> int:
        """The step at which this command ends."""
        return self.stop_at or self.steps

    def problems(self) -> list[str]:
        problems = []
        for name in ("steps", "global_batch_size", "log_every", "validation_samples"):
            if getattr(self, name) < 1:
                problems.append(f"loop.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.stop_at <= self.steps:
            problems.append(f"loop.stop_at={self.stop_at} must be 0 (all steps) to {self.steps}")
        if self.validate_every < 0:
            problems.append("loop.validate_every must not be negative; 0 = only at the end")
        return problems


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings that all training stages share."""

    data: str = "data/raw"
    """The pairs: s3://bucket/prefix or a folder; several by shares of each batch: A:0.7,B:0.3."""
    grow: bool = False
    """Look for a newer version of the data set (`tapir pack --append`) after each epoch, and read
    it from then on; else a run reads the version that it began with."""
    out: Path = Path("runs/stage")
    """Run folder: config, metrics, TensorBoard, checkpoints; the same folder resumes."""
    init: str = ""
    """Start from the weights of a run, finished model or checkpoint: a folder or s3://; by name,
    also with another vocabulary, grid or text length. A run with a checkpoint does not read it,
    unless it trains adapters."""
    init_bpe: Path | None = None
    """Folder of the tokenizer.json of init's weights, if it is another one than --bpe's."""
    resume_with: str = ""
    """Settings to change on purpose when a run resumes, e.g. optim.lr=1e-4,loop.steps=2000; they
    are written into the run's history.json."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length and intervals."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW."""
    freeze: str = ""
    """Regular expression: parameters in whose global name it is found are not trained."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Arrangement of the ranks."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine that computes the step."""
    compress: CompressConfig = field(default_factory=CompressConfig)
    """Gradient compression."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Order of the records."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Fetching of the records."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Guards against spikes and corruption."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profile and traces."""
    track: str = "tensorboard"
    """Trackers that get the figures, pictures and histograms, with commas between them:
    tensorboard, wandb, trackio; empty = metrics.jsonl alone. One that fails never stops a run."""
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    """Restarts of the ranks that this command starts itself."""

    def sizes(self) -> ModelSizes:
        """Model sizes that the mesh must divide."""
        return ModelSizes()

    def model_problems(self) -> list[str]:
        """Problems of the network's sizes."""
        return []

    def problems(self, world: int | None = None) -> list[str]:
        """All problems at once; `world` is the number of ranks that a launcher started.

        This includes the requirements of validations, saves and the end of the run, so that none
        fails hours later.
        """
        sizes = self.sizes()
        problems = self.fixed_problems() + self.mesh.problems(world, sizes)
        replicas = max(self.mesh.data, 1)
        problems += self.order.problems(self.loop.global_batch_size, replicas)
        problems += self.engine.problems(
            self.loop.global_batch_size // replicas, self.mesh, self.compress.on, sizes.layers
        )
        return problems

    def gpu_problems(self) -> list[str]:
        """Problems of a run on GPUs, beside those of every run."""
        return self.engine.gpu_problems()

    def fixed_problems(self) -> list[str]:
        """Problems that do not depend on the mesh or the engine."""
        problems = self.loop.problems() + self.optim.problems() + self.compress.problems()
        problems += self.checkpoint.problems() + self.guard.problems() + self.supervisor.problems()
        problems += self.profile.problems() + self.loader.problems() + self.model_problems()
        problems += mixture_problems(self.data, "data") + folder_problems(self.out, "out")
        problems += expression_problems(self.freeze, "freeze")
        problems += place_problems(self.init, "init") + resume_with_problems(self)
        problems += track_problems(self.track)
        if self.grow and len(data_sets(self.data)) > 1:
            problems.append(
                "grow reads one data set, and data is a mixture: leave --grow out, and each set is "
                "read in the version that the run began with"
            )
        return problems + self._validation_problems()

    def _validation_problems(self) -> list[str]:
        """Problems of validations, and of settings that need validations."""
        loop, lanes, problems = self.loop, self.order.lanes, []
        if 0 < loop.validation_samples < lanes:
            problems.append(
                f"loop.validation_samples={loop.validation_samples} is less than order.lanes="
                f"{lanes}, and each lane must give a validation the same number; try "
                f"--loop.validation-samples {lanes}, or fewer lanes"
            )
        if self.optim.halvings and not loop.validate_every:
            problems.append(
                "optim.halvings needs validations to see a plateau; set loop.validate_every, or "
                "--optim.halvings 0 for the cosine"
            )
        if self.guard.min_codebook_usage and not loop.validate_every:
            problems.append(
                "guard.min_codebook_usage needs validations, which count codes; set "
                "loop.validate_every, or --guard.min-codebook-usage 0"
            )
        if self.checkpoint.best and not self._saves_validated():
            problems.append(
                f"checkpoint.best: only the last of loop.steps={loop.steps} is both validated "
                f"(loop.validate_every={loop.validate_every}) and saved (checkpoint.every="
                f"{self.checkpoint.every}); make one a multiple of the other"
            )
        return problems

    def _saves_validated(self) -> bool:
        """True if a step before the last is validated and saved, or one happens only at the end."""
        often = (self.checkpoint.every, self.loop.validate_every)
        if min(often) < 1:
            return self.checkpoint.every < 1  # reported by CheckpointConfig.problems
        return math.lcm(*often) < self.loop.steps or max(often) >= self.loop.steps

    def _prior_only_problems(self) -> list[str]:
        """Features that only the prior supports; for the dVAE and CLIP."""
        problems = []
        if self.engine.precision == "fp16":
            problems.append(
                "engine.precision=fp16 needs a gradient scale for each resblock, which only the "
                "prior has: small gradients would become zero; use --engine.precision bf16"
            )
        if self.compress.on:
            problems.append(
                "compress.rank: only the prior's gradients can be compressed; set --compress.rank 0"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class DVAETrain(StageConfig):
    """Train the dVAE on images alone."""

    out: Path = Path("runs/dvae")
    """Run folder: config, metrics, TensorBoard, checkpoints; the same folder resumes."""
    model: DVAEConfig = field(default_factory=DVAEConfig)
    """The network."""
    augment: bool = True
    """Train on random crops and flips (the paper's listing 1) instead of central squares."""
    tau_first: float = 1.0
    """Gumbel temperature at the first step."""
    tau_last: float = 1 / 16
    """Final Gumbel temperature, reached by a cosine."""
    tau_fraction: float = 0.8
    """Fraction of the run over which the temperature is annealed."""
    beta_first: float = 0.0
    """Weight of the KL term at the first step (the paper: 0)."""
    beta: float = 6.6
    """Final weight of the KL term, reached by a cosine (the paper: 6.6)."""
    beta_fraction: float = 0.3
    """Fraction of the run over which beta is annealed."""
    commitment: float = 0.25
    """vq: weight of the squared difference between encoder outputs and their codes' vectors."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """A perceptual loss."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """A patch discriminator."""
    rfid: Path | None = None
    """Inception's weights (safetensors), for the reconstruction FID at validations; default: no
    FID."""

    def weights_files(self) -> dict[str, Path]:
        """Files of other networks' weights that the run reads, by flag."""
        files = {
            "perceptual.vgg": self.perceptual.vgg,
            "perceptual.linear": self.perceptual.linear,
            "rfid": self.rfid,
        }
        return {name: path for name, path in files.items() if path is not None}

    def model_problems(self) -> list[str]:
        problems = self.model.problems() + self._prior_only_problems()
        problems += self.perceptual.problems(self.model.pixels)
        problems += self.discriminator.problems(self.model.pixels) + self._init_problems()
        if not 0 < self.tau_last <= self.tau_first < math.inf:
            problems.append("tau_last must be positive and not above tau_first")
        if not (0 < self.tau_fraction <= 1 and 0 < self.beta_fraction <= 1):
            problems.append("tau_fraction and beta_fraction must be above 0 and at most 1")
        if not (0 <= self.beta_first < math.inf and 0 <= self.beta < math.inf):
            problems.append("beta_first and beta must not be negative")
        if not 0 <= self.commitment < math.inf:
            problems.append(f"commitment={self.commitment} must not be negative; try 0.25")
        return problems

    def _init_problems(self) -> list[str]:
        """Of runs alone: a finished model of such a run can still be read."""
        if self.model.quantizer == "gumbel" or self.model.init == "calibrated":
            return []
        return [
            f"model.quantizer={self.model.quantizer} needs --model.init calibrated: only this fits "
            f"encoder outputs to the codes, and model.init={self.model.init} leaves most of them "
            "unused"
        ]


@dataclass(frozen=True, kw_only=True)
class PriorTrain(StageConfig):
    """Train the transformer on the tokens of the token job."""

    data: str = "data/tokens"
    """The tokens: s3://bucket/prefix or a folder; several by shares of each batch: A:0.7,B:0.3."""
    out: Path = Path("runs/prior")
    """Run folder: config, metrics, TensorBoard, checkpoints; the same folder resumes."""
    model: PriorConfig = field(default_factory=PriorConfig)
    """The network."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, trained in place of the network."""
    bpe_dropout: float = 0.0
    """Probability of dropping a BPE merge, drawn again at every reading (the paper: 0.1)."""
    bpe: Path = Path("runs/bpe")
    """Folder of the tokens' tokenizer.json; only read if bpe_dropout is above 0."""
    caption_dropout: float = 0.0
    """Probability of an empty caption, for classifier-free guidance in sampling; try 0.1 (the
    paper: none)."""

    def sizes(self) -> ModelSizes:
        model = self.model
        return ModelSizes(
            heads=model.heads, layers=model.layers, cuttable=True, positions=model.length
        )

    def model_problems(self) -> list[str]:
        problems = self.model.problems() + self.guard.without_codes()
        if not 0 <= self.bpe_dropout < 1:
            problems.append(f"bpe_dropout={self.bpe_dropout} must be in [0, 1); the paper's is 0.1")
        if not 0 <= self.caption_dropout < 1:
            problems.append(f"caption_dropout={self.caption_dropout} must be in [0, 1); try 0.1")
        return problems + self.lora.problems(self.model.dim, self.init, self.compress.on)


@dataclass(frozen=True, kw_only=True)
class ClipTrain(StageConfig):
    """Train the reranker on raw pairs."""

    out: Path = Path("runs/clip")
    """Run folder: config, metrics, TensorBoard, checkpoints; the same folder resumes."""
    bpe: Path = Path("runs/bpe")
    """Folder of tokenizer.json."""
    model: ClipConfig = field(default_factory=ClipConfig)
    """The network."""

    def model_problems(self) -> list[str]:
        return self.model.problems() + self._prior_only_problems() + self.guard.without_codes()


@dataclass(frozen=True, kw_only=True)
class BPETrain:
    """Learn the tokenizer's merges from the captions of the train split."""

    data: str = "data/raw"
    """The raw pairs: s3://bucket/prefix or a folder."""
    texts: Path | None = None
    """A UTF-8 file with one caption per line, instead of the raw pairs."""
    out: Path = Path("runs/bpe")
    """Folder for tokenizer.json."""
    vocabulary: int = 512
    """Entries, 256 of them bytes (the paper: 16384)."""
    spaces: Literal["alone", "joined"] = "alone"
    """alone = every space is a token (the paper); joined = a word merges with the space before it:
    half the tokens per caption, and a prior learns object positions earlier."""
    max_captions: int = 1_000_000
    """Maximum captions to read."""
    task_captions: int = 50_000
    """Pairs, at least, whose captions a worker counts at a time."""
    worker: str = ""
    """This process's part of the counting, i/n with i from 0; by default set by a Slurm array, a
    Kubernetes indexed job, MPI or torchrun. All workers need the same --out."""

    def problems(self) -> list[str]:
        problems = [] if self.texts is not None else place_problems(self.data, "data")
        problems += folder_problems(self.out, "out")
        if not 256 < self.vocabulary <= 65536:
            problems.append(
                f"vocabulary={self.vocabulary} must be 257 to 65536 (256 of them are bytes)"
            )
        if min(self.max_captions, self.task_captions) < 1:
            problems.append("max_captions and task_captions must be at least 1")
        return problems
