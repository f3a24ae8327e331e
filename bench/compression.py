"""Held-out loss of a prior against the rank of its compressed gradients, over some seeds.

Trains on the token data set that TAPIR_BENCH_TOKENS names (default: makes one from shapes), two
replicas each, 1,000 steps; finished runs are not repeated. docs/engine.md has the figures and
conclusions.
"""

from typing import Any

from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import DATA, make_tokens, run_tapir
from training.run.folder import read_metrics

SEEDS = sized((0, 1, 2), (0,))
STEPS = sized(1000, 2)
WIDTHS: dict[int, tuple[int, ...]] = sized({96: (6, 12, 16, 22, 43), 160: (36,)}, {96: (22,)})
"""Width -> ranks; 22 and 36 are the paper's 0.226 of the width, 16 saves 75%."""
PAPERS = {96: 22, 160: 36}
HELD_OUT = sized(512, 16)
FOLDER = cache("compression")


def run() -> list[dict[str, Any]]:
    """One row a width, rank and variant; ratio > 1 means a lower loss than uncompressed."""
    tokens = make_tokens(FOLDER / "data", *DATA)
    rows = []
    for width, ranks in WIDTHS.items():
        plain = _losses(tokens, width, 0, "plain", [])
        rows.append(_row(width, 0, "uncompressed", plain, plain))
        for rank in ranks:
            for variant, flags in _variants(rank == PAPERS[width] and width == 96).items():
                losses = _losses(tokens, width, rank, variant, flags)
                rows.append(_row(width, rank, variant, losses, plain))
    return rows


def saved_share(width: int, rank: int) -> float:
    """Share of the bytes of a block's six matrices that factors of this rank do not send."""
    shapes = [(width, width)] * 4 + [(4 * width, width)] * 2
    raw = sum(rows * columns for rows, columns in shapes)
    return 1 - sum(rank * (rows + columns) for rows, columns in shapes) / raw


def _variants(without_feedback: bool) -> dict[str, list[str]]:
    variants = {"fixed Q": [], "warm Q": ["--compress.warm-start"]}
    if without_feedback:
        variants["fixed Q, no error feedback"] = ["--compress.no-error-feedback"]
        variants["fixed Q, 16-bit factors"] = ["--compress.payload=bf16"]
    return variants


def _losses(tokens: str, width: int, rank: int, variant: str, flags: list[str]) -> list[float]:
    return [_train(tokens, width, rank, variant, seed, flags) for seed in SEEDS]


def _train(tokens: str, width: int, rank: int, variant: str, seed: int, flags: list[str]) -> float:
    name = f"{width}-{rank}-{variant}-{seed}".replace(" ", "_").replace(",", "")
    out = FOLDER / name
    command = [
        "train",
        "prior",
        "tiny",
        f"--data={tokens}",
        f"--out={out}",
        f"--loop.steps={STEPS}",
        "--loop.global-batch-size=16",
    ]
    command += [f"--loop.seed={seed}", f"--loop.validation-samples={HELD_OUT}"]
    command += [f"--loop.validate-every={STEPS}", f"--checkpoint.every={STEPS}"]
    command += [f"--model.dim={width}", f"--model.heads={width // 32}", "--engine.name=reference"]
    command += ["--mesh.data=2", f"--compress.rank={rank}", *flags]
    run_tapir(*command)
    rows = [row for row in read_metrics(out) if row.get("split") == "validation"]
    assert rows and rows[-1]["step"] == STEPS, f"{out} did not end with a validation row"
    return float(rows[-1]["loss"])


def _row(
    width: int, rank: int, variant: str, losses: list[float], plain: list[float]
) -> dict[str, Any]:
    mean, base = sum(losses) / len(losses), sum(plain) / len(plain)
    saved = f", {saved_share(width, rank):.0%} saved" if rank else ""
    return bench_row(
        f"width {width} rank {rank} {variant}{saved}",
        mean,
        "nats",
        f"uncompressed {base:.4f} [{min(plain):.4f}, {max(plain):.4f}]",
        losses,
        ratio=base / mean,
    )
