"""Held-out loss of a prior against the rank of its compressed gradients, over some seeds.

Trains on the token data set that TAPIR_BENCH_TOKENS names (default: makes one from shapes), two
replicas each, 1,000 steps; finished runs are not repeated. docs/engine.md has the figures and
conclusions. `--payloads` trains what tells 16-bit factors from fp32 ones alone.
"""

from dataclasses import dataclass
from typing import Any

from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import DATA, make_tokens, run_tapir
from training.run.folder import read_metrics

SEEDS = sized(3, 1)
STEPS = sized(1000, 2)
WIDTHS: dict[int, tuple[int, ...]] = sized({96: (6, 12, 16, 22, 43), 160: (36,)}, {96: (22,)})
"""Width -> ranks; 22 and 36 are the paper's 0.226 of the width, 16 saves 75%."""
PAPERS = {96: 22, 160: 36}
HELD_OUT = sized(512, 16)
FOLDER = cache("compression")
FIXED, HALVES = "fixed Q", "fixed Q, 16-bit factors"


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What each variant is trained with."""

    tokens: str
    steps: int
    seeds: int

    def losses(self, width: int, rank: int, variant: str, flags: list[str]) -> list[float]:
        """Held-out losses by seed, in nats."""
        return [self._train(width, rank, variant, seed, flags) for seed in range(self.seeds)]

    def _train(self, width: int, rank: int, variant: str, seed: int, flags: list[str]) -> float:
        name = f"{width}-{rank}-{variant}-{seed}".replace(" ", "_").replace(",", "")
        out = FOLDER / (name if self.steps == STEPS else f"{name}-{self.steps}")
        command = [
            "train",
            "prior",
            "tiny",
            f"--data={self.tokens}",
            f"--out={out}",
            f"--loop.steps={self.steps}",
            "--loop.global-batch-size=16",
        ]
        command += [f"--loop.seed={seed}", f"--loop.validation-samples={HELD_OUT}"]
        command += [f"--loop.validate-every={self.steps}", f"--checkpoint.every={self.steps}"]
        command += [f"--model.dim={width}", f"--model.heads={width // 32}"]
        command += ["--engine.name=reference", "--mesh.data=2", f"--compress.rank={rank}", *flags]
        run_tapir(*command)
        rows = [row for row in read_metrics(out) if row.get("split") == "validation"]
        assert rows and rows[-1]["step"] == self.steps, f"{out} has no validation row at its end"
        return float(rows[-1]["loss"])


def run(payloads: bool = False, steps: int = STEPS, seeds: int = SEEDS) -> list[dict[str, Any]]:
    """One row a width, rank and variant; ratio > 1 means a lower loss than uncompressed.

    `payloads`: only the narrowest width at the paper's rank, with fp32 and with 16-bit factors.
    """
    runs = Runs(tokens=make_tokens(FOLDER / "data", *DATA), steps=steps, seeds=seeds)
    narrow = min(WIDTHS)
    rows = []
    for width, ranks in ({narrow: (PAPERS[narrow],)} if payloads else WIDTHS).items():
        plain = runs.losses(width, 0, "plain", [])
        rows.append(_row(width, 0, "uncompressed", plain, plain))
        for rank in ranks:
            variants = _variants(rank == PAPERS[width] and width == narrow)
            losses = {
                name: runs.losses(width, rank, name, flags)
                for name, flags in variants.items()
                if name in (FIXED, HALVES) or not payloads
            }
            rows += [_row(width, rank, name, each, plain) for name, each in losses.items()]
            if HALVES in losses:
                whole = losses[FIXED]
                rows.append(_row(width, rank, HALVES, losses[HALVES], whole, "fp32 factors"))
    return rows


def saved_share(width: int, rank: int) -> float:
    """Share of the bytes of a block's six matrices that factors of this rank do not send."""
    shapes = [(width, width)] * 4 + [(4 * width, width)] * 2
    raw = sum(rows * columns for rows, columns in shapes)
    return 1 - sum(rank * (rows + columns) for rows, columns in shapes) / raw


def _variants(without_feedback: bool) -> dict[str, list[str]]:
    variants = {FIXED: [], "warm Q": ["--compress.warm-start"]}
    if without_feedback:
        variants["fixed Q, no error feedback"] = ["--compress.no-error-feedback"]
        variants[HALVES] = ["--compress.payload=bf16"]
    return variants


def _row(
    width: int,
    rank: int,
    variant: str,
    losses: list[float],
    others: list[float],
    baseline: str = "uncompressed",
) -> dict[str, Any]:
    mean, base = sum(losses) / len(losses), sum(others) / len(others)
    saved = f", {saved_share(width, rank):.0%} saved" if rank else ""
    return bench_row(
        f"width {width} rank {rank} {variant}{saved}",
        mean,
        "nats",
        f"{baseline} {base:.4f} [{min(others):.4f}, {max(others):.4f}]",
        losses,
        ratio=base / mean,
    )
