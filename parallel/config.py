"""Settings of the mesh, the engine and the optimiser; imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from parallel.compress.between import between_problems
from parallel.pipelines.schedules import Schedule, schedule_problems, split_problems

EngineName = Literal["reference", "deepspeed_zero", "deepspeed_pipe", "torch"]
CPU_BUCKET, GPU_BUCKET = 2**20, 2**24
"""Default elements of a gradient bucket: ZeRO allocates one, and on GPUs each is a collective."""
LEAST_GAIN = 1.25
"""Least speed-up for which `auto` chooses the less exact mode: 16 bits cost accuracy."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of a model that limit its mesh."""

    heads: int = 1
    """Attention heads; padded where the tensor degree does not divide them."""
    layers: int = 1
    """Layers that a pipeline can cut between."""
    cuttable: bool = False
    """True if the model's matrices can be cut over tensor ranks."""
    positions: int = 1
    """Positions of a sample's stream, which sequence parallelism cuts."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How ranks are arranged: world = data * pipeline * tensor."""

    data: int = 1
    """Replicas that each read their own part of the global batch."""
    tensor: int = 1
    """Ranks that share each matmul; heads are padded if it does not divide them."""
    pipeline: int = 1
    """Stages that the layers are cut into."""
    nodes: int = 1
    """Nodes of the replicas; above 1, ZeRO-3 shards inside a node, and gradients are reduced (and
    compressed) between nodes."""
    sequence_parallel: bool = False
    """Tensor ranks share the positions of norms and residuals, too: less memory at equal traffic;
    mesh.tensor must divide the positions of a sample."""

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def local(self) -> int:
        """Replicas of one node."""
        return self.data // self.nodes

    def problems(
        self,
        world: int | None = None,
        sizes: ModelSizes = ModelSizes(),
    ) -> list[str]:
        """Check the mesh against the model and against `world`, the number of started ranks."""
        problems = []
        if min(self.data, self.tensor, self.pipeline, self.nodes) < 1:
            return ["mesh.data, tensor, pipeline and nodes must be at least 1"]
        if not sizes.cuttable and self.tensor * self.pipeline > 1:
            problems.append(
                "mesh.tensor and mesh.pipeline must be 1: this stage's model is trained by data "
                f"parallelism alone; try --mesh.data {self.world}"
            )
        elif self.tensor > max(sizes.heads, 1):
            problems.append(
                f"mesh.tensor={self.tensor} is more than {sizes.heads} heads; try {sizes.heads}"
            )
        if sizes.cuttable and self.pipeline > max(sizes.layers, 1):
            problems.append(
                f"mesh.pipeline={self.pipeline} is more than {sizes.layers} layers; "
                f"try {sizes.layers}"
            )
        problems += self._sequence_problems(sizes)
        if self.data % self.nodes:
            divisors = [d for d in range(1, self.data + 1) if self.data % d == 0]
            near = min(divisors, key=lambda d: abs(d - self.nodes))
            problems.append(
                f"mesh.nodes={self.nodes} does not divide mesh.data={self.data}; try {near}"
            )
        elif self.nodes > 1 and self.local < 2:
            problems.append(
                f"mesh.nodes={self.nodes} leaves one replica a node, and nothing to shard "
                f"ZeRO-3 over; try --mesh.data {2 * self.nodes}, or --mesh.nodes 1"
            )
        block = self.tensor * self.pipeline
        if world is not None and world != self.world:
            hint = (
                f"try --mesh.data {world // block}"
                if world % block == 0
                else f"start a multiple of {block} ranks"
            )
            problems.append(
                f"the mesh data={self.data} x tensor={self.tensor} x pipeline={self.pipeline} "
                f"needs {self.world} ranks, but {world} were started; {hint}"
            )
        return problems

    def _sequence_problems(self, sizes: ModelSizes) -> list[str]:
        if not self.sequence_parallel:
            return []
        if self.tensor == 1:
            return [
                "mesh.sequence_parallel shares positions between tensor ranks, and mesh.tensor is "
                "1; set --mesh.tensor 2, or --mesh.no-sequence-parallel"
            ]
        if sizes.positions % self.tensor:
            more = -sizes.positions % self.tensor
            return [
                f"mesh.sequence_parallel: mesh.tensor={self.tensor} does not divide the "
                f"{sizes.positions} positions of a sample; use {more} more text positions, or "
                "--mesh.no-sequence-parallel"
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine decay."""
    decay_fraction: float = 1.0
    """Fraction of the run in which the cosine decays; after it final_lr is held."""
    halvings: int = 0
    """Halvings of the learning rate at plateaus of the validation loss, instead of the cosine;
    0 = the cosine (the paper's prior: 5)."""
    patience: int = 5
    """Validations without a new best loss that make a plateau."""
    plateau_threshold: float = 0.001
    """Fraction by which a loss must be below the best one to count as a new best."""
    warmup: int = 50
    """Steps of the linear rise from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.96
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.045
    """Decoupled weight decay of matrices; gains and biases have none."""
    clip_norm: float = 4.0
    """Global gradient norm above which gradients are scaled down."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Type of AdamW's stored moments; bf16 takes half of the memory."""
    max_variance: float = 0.0
    """Cap of AdamW's running variance, before it is used; 0 = none (the paper's prior: 5)."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is exported; 0 = none (the paper's prior:
    0.99)."""
    ema_every: int = 25
    """Steps between two updates of that average."""

    def problems(self) -> list[str]:
        problems = []
        if not (0 < self.lr < math.inf and self.clip_norm > 0 and 0 < self.eps < math.inf):
            problems.append("optim.lr, optim.eps and optim.clip_norm must be positive numbers")
        if not (0 <= self.final_lr < math.inf and 0 <= self.weight_decay < math.inf):
            problems.append("optim.final_lr and optim.weight_decay must not be negative")
        if self.warmup < 0:
            problems.append("optim.warmup must not be negative")
        if not 0 < self.decay_fraction <= 1:
            problems.append(
                f"optim.decay_fraction={self.decay_fraction} must be above 0 and at most 1"
            )
        if self.halvings < 0 or self.patience < 1 or not 0 <= self.plateau_threshold < 1:
            problems.append(
                "optim.halvings must not be negative, optim.patience at least 1 and "
                "optim.plateau_threshold in [0, 1)"
            )
        if not 0 <= self.max_variance < math.inf:
            problems.append("optim.max_variance must not be negative; 0 = none")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            problems.append("optim.beta1 and optim.beta2 must be in [0, 1)")
        if not 0 <= self.ema < 1 or self.ema_every < 1:
            problems.append("optim.ema must be in [0, 1), and optim.ema_every at least 1")
        if self.moments == "bf16" and max(self.beta1, self.beta2) > 0.98:
            problems.append(
                "optim.moments=bf16 cannot follow moments with a beta above 0.98; lower beta2 (the "
                "paper: 0.96), or use --optim.moments fp32"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """PowerSGD between replicas (the paper, appendix E)."""

    rank: int | Literal["auto"] = 0
    """Total rank of a compressed matrix, over its shards; 0 = off (the paper: 0.226 * dim); auto =
    the paper's, if a measurement at start-up shows that it saves time on this link."""
    warm_start: bool = False
    """Start each step from the last Q instead of the fixed one (the paper: fixed)."""
    error_feedback: bool = True
    """Add the compression error of earlier steps to the next gradient."""

    payload: Literal["fp32", "bf16"] = "fp32"
    """Type of the factors that are sent; bf16 halves their bytes, and error feedback takes what
    the rounding loses. All else is sent in fp32."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of a sent value of a factor."""
        return 2 if self.payload == "bf16" else 4

    @property
    def on(self) -> bool:
        """True unless compression is switched off."""
        return self.rank != 0

    def problems(self) -> list[str]:
        if self.rank != "auto" and self.rank < 0:
            return [f"compress.rank={self.rank} must not be negative; 0 turns compression off"]
        return []


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine owns the training step."""

    name: EngineName = "reference"
    """reference (plain torch), deepspeed_zero (ZeRO-1/2/3, with tensor parallelism),
    deepspeed_pipe (tensor x pipeline x data, ZeRO-1) or torch (FSDP2: weights sharded as in ZeRO-3,
    with tensor parallelism and pipelines; reductions hidden behind the backward pass)."""
    zero_stage: int = 1
    """What deepspeed_zero shards over replicas: 1 = optimiser, 2 = gradients too, 3 = weights."""
    schedule: Schedule = "1f1b"
    """Order of a pipeline's passes, with engine torch. interleaved: each stage holds several chunks
    of layers, which makes the bubble smaller; zero-bubble: gradients of weights fill it, too."""
    virtual_stages: int = 1
    """Chunks of layers on each stage, with interleaved and zero-bubble."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step on each replica; a pipeline's stages work on them concurrently."""
    reduce_bucket_size: int = 0
    """Elements of gradients that DeepSpeed reduces together, and of weights that it gathers: larger
    ones take memory, smaller ones more of a link's latency; 0 = 2^20 on CPUs, 2^24 on GPUs."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    recompute_granularity: Literal["full", "selective"] = "full"
    """What `recompute` recomputes: full = each resblock from its input; selective = norms,
    activation functions and attention of the prior, from the outputs of matmuls, which are kept."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """auto: chosen before the first step and kept for the run: on CPUs the faster of fp32 and bf16
    by a matmul that all ranks time; on GPUs bf16 if supported. bf16: matmuls in bf16 with fp32
    accumulation. fp16: residual branches in fp16, each with its own gradient scale; emulated on
    CPUs. In both, weights, moments, norms, logits and sums of gradients stay fp32."""
    reduce_precision: Literal["fp32", "16-bit"] = "fp32"
    """What engine torch adds up matrices' gradients of residual branches in. 16-bit halves the
    bytes: the branch's type over a node's ranks, bf16 between nodes; micro-batches still add up in
    fp32."""
    matmul_precision: Literal["auto", "highest", "medium"] = "auto"
    """fp32 matmuls, and on GPUs convolutions: highest = fp32 throughout; medium = TF32 on GPUs;
    auto = highest on GPUs; on CPUs medium if it is as accurate and faster in a matmul that all
    ranks time; chosen once, like `precision`."""
    deterministic: bool = True
    """On GPUs: algorithms that give the same bits every time, so that a resumed run equals an
    unbroken one; off = maybe faster. CPUs always do."""

    @property
    def shards_weights(self) -> bool:
        """True if weights are sharded over the replicas of a node."""
        return self.name == "torch" or (self.name == "deepspeed_zero" and self.zero_stage == 3)

    def bucket(self, gpu: bool) -> int:
        """Elements of a bucket on this kind of device."""
        return self.reduce_bucket_size or (GPU_BUCKET if gpu else CPU_BUCKET)

    @property
    def selective(self) -> bool:
        """True if not whole resblocks are recomputed."""
        return self.recompute_granularity == "selective"

    def _size_problems(self, batch_per_replica: int) -> list[str]:
        problems = []
        if self.reduce_bucket_size < 0:
            problems.append(
                f"engine.reduce_bucket_size={self.reduce_bucket_size} must not be negative; "
                "0 = by the device"
            )
        steps = self.gradient_accumulation_steps
        if steps < 1 or batch_per_replica % max(steps, 1):
            near = [n for n in range(1, batch_per_replica + 1) if batch_per_replica % n == 0]
            best = min(near, key=lambda n: abs(n - steps), default=1)
            problems.append(
                f"engine.gradient_accumulation_steps={steps} does not divide the "
                f"{batch_per_replica} samples of a replica; try {best}"
            )
        return problems

    def gpu_problems(self) -> list[str]:
        """What this engine cannot do on GPUs."""
        return split_problems(self.schedule, False, gpu=True)

    def problems(
        self, batch_per_replica: int, mesh: MeshConfig, compress: bool, layers: int = 0
    ) -> list[str]:
        """What this engine cannot do on this mesh, each with the nearest supported setting.

        `layers`: that a pipeline can cut between; 0 = one for each chunk.
        """
        problems = split_problems(self.schedule, self.recompute)
        if self.zero_stage not in (1, 2, 3):
            problems.append(f"engine.zero_stage={self.zero_stage} must be 1, 2 or 3; try 1")
        problems += self._size_problems(batch_per_replica)
        if self.name == "reference" and mesh.tensor * mesh.pipeline > 1:
            problems.append(
                "engine.name=reference has no tensor or pipeline ranks; use --engine.name "
                + ("deepspeed_pipe" if mesh.pipeline > 1 else "deepspeed_zero")
            )
        if self.reduce_precision != "fp32" and self.name != "torch":
            problems.append(
                f"engine.reduce_precision={self.reduce_precision} is of torch's own stack; use "
                "--engine.name torch, or --engine.reduce-precision fp32"
            )
        if self.name == "deepspeed_zero" and mesh.pipeline > 1:
            problems.append(
                "engine.name=deepspeed_zero has no pipeline; use --engine.name deepspeed_pipe"
            )
        stages = mesh.pipeline if self.name == "torch" else 1
        settings = (self.schedule, self.virtual_stages, stages, self.gradient_accumulation_steps)
        problems += schedule_problems(*settings, layers or stages * self.virtual_stages)
        if self.name == "deepspeed_pipe" and self.zero_stage != 1:
            problems.append(
                f"engine.zero_stage={self.zero_stage} does not go with a pipeline: DeepSpeed "
                "refuses it; use --engine.zero-stage 1"
            )
        if self.name != "reference" and mesh.world < 2:
            problems.append(
                f"engine.name={self.name} needs at least 2 ranks, e.g. mesh.data=2; "
                "on one process use --engine.name reference"
            )
        whole = mesh.tensor * mesh.pipeline == 1
        problems += between_problems(mesh.nodes, mesh.data, whole, self.shards_weights, compress)
        return problems
