"""Steps that a prior started from another's weights (`--init`) needs for a fresh one's loss.

One dVAE and one tokenizer for all sets. A prior learns Apple's emoji, and one the generated shapes;
then, for Google's, Twitter's and Facebook's emoji, a fresh prior trains STEPS steps, and others
start from those two. Each has its whole schedule, warm-up to decay; one started from Apple's has
STARTED_STEPS, and a fresh prior with as few is the control. Value: the first validation with at
most the fresh run's lowest held-out loss, as a fraction of the steps of that loss; if there is
none, as if it came one validation after STEPS. Splits go by code point, so that no picture of a
held-out emoji was seen in another vendor's style.

The pictures come through npm onto this machine; none is stored in the repository or an example.
Finished runs are not repeated.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from bench.support.rows import Row, bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import run_tapir
from core.files.atomic import write_atomic
from data_pipeline.sources.emoji import emoji_pairs
from data_pipeline.sources.units import shapes_pairs
from training.run.folder import read_metrics

APPLE, SHAPES = sized("apple", "google"), "shapes"
TARGETS = sized(("google", "twitter", "facebook"), ("google",))
Curve = list[dict[str, Any]]
LOSSES = ("loss", "image_loss")
SEEDS = sized((0, 1, 2), (0,))
STEPS = sized(400, 4)
STARTED_STEPS = sized({"apple": 140, "shapes": 400}, {"google": 2, "shapes": 4})
"""Steps of a prior that starts from a set's."""
SHORT = "short"
EVERY = sized(20, 2)
"""Steps between validations, and so the resolution of the value."""
DVAE_STEPS = sized(1500, 2)
PAIRS = sized(10**9, 160)
"""Maximum emoji of a vendor, without skin tones."""
SCENES = sized(4000, 160)
FOLDER = cache("finetune")
SMALL = sized([], ["--model.dim=48", "--model.heads=2", "--model.layers=2", "--order.lanes=4"])
"""Flags of the miniature's priors."""


def run() -> list[Row]:
    """One row a target, start and loss; ratio = steps of the fresh prior / of the started one.

    The start SHORT is none: a fresh prior with the steps of one from Apple's.
    """
    _make_tokens()
    rows = []
    for target in TARGETS:
        fresh = [_curve(target, seed) for seed in SEEDS]
        for start in (APPLE, SHAPES, SHORT):
            started = [_curve(target, seed, start) for seed in SEEDS]
            name = f"{target}, {'fresh, short' if start == SHORT else f'from {start}'}"
            rows += [_row(f"{name}, {loss}", loss, fresh, started) for loss in LOSSES]
    return rows


def _row(name: str, loss: str, fresh: list[Curve], started: list[Curve]) -> Row:
    fractions = [_fraction(loss, *pair) for pair in zip(fresh, started, strict=True)]
    return bench_row(
        f"{name}: steps to the fresh prior's lowest, of its steps",
        sum(fractions) / len(fractions),
        "fraction of steps",
        f"a fresh prior, {len(SEEDS)} seeds",
        [1 / fraction for fraction in fractions],
    )


def _fraction(loss: str, fresh: Curve, started: Curve) -> float:
    """Steps until `started` has the lowest loss of `fresh`, over the steps of `fresh` to it."""
    lowest = min(fresh, key=lambda row: float(row[loss]))
    reached = [row["step"] for row in started if row[loss] <= lowest[loss]]
    return float([*reached, STEPS + EVERY][0] / lowest["step"])


def _curve(target: str, seed: int, start: str = "") -> Curve:
    """Validation rows of a prior of a set, fresh or started from another's weights."""
    if not start:
        return _train(target, f"{target}-{seed}", seed)
    if start == SHORT:
        return _train(target, f"{target}-short-{seed}", seed, STARTED_STEPS[APPLE])
    _train(start, f"{start}-{seed}", seed)
    out, init = f"{target}-from-{start}-{seed}", f"--init={FOLDER}/{start}-{seed}"
    return _train(target, out, seed, STARTED_STEPS[start], init)


def _train(name: str, out: str, seed: int, steps: int = STEPS, *flags: str) -> Curve:
    run_tapir(
        *("train", "prior", "tiny", f"--data={FOLDER}/tokens-{name}", f"--out={FOLDER / out}"),
        *(f"--loop.steps={steps}", f"--loop.validate-every={EVERY}", f"--loop.seed={seed}"),
        *("--loop.global-batch-size=32", f"--loop.validation-samples={sized(256, 16)}"),
        *(f"--bpe={FOLDER}/bpe", f"--checkpoint.every={steps}"),
        *("--engine.name=reference", "--mesh.data=1", "--engine.precision=fp32"),
        *("--optim.warmup=20", *SMALL, *flags),
    )
    return [row for row in read_metrics(FOLDER / out) if row.get("split") == "validation"]


def _make_tokens() -> None:
    """Pack all sets, train one dVAE and one tokenizer on all, and tokenize; parts are kept."""
    sets = tuple(dict.fromkeys((APPLE, *TARGETS, SHAPES)))
    block = f"--block={sized(16, 4)}"
    pack = ["--validation=0.15", block]
    for name in sets:
        source = SHAPES if name == SHAPES else str(_pictures(name))
        count = [f"--count={SCENES}"] if name == SHAPES else []
        run_tapir("pack", source, f"{FOLDER}/raw-{name}", *count, *pack)
    texts = FOLDER / "captions.txt"
    if not texts.exists():
        captions = sorted({path.read_text() for path in FOLDER.glob("pictures-*/*.txt")})
        write_atomic(texts, "".join(f"{text}\n" for text in [*captions, *_scenes()]).encode())
    run_tapir("train", "bpe", "tiny", f"--texts={texts}", f"--out={FOLDER}/bpe")
    mixture = ",".join(f"{FOLDER}/raw-{name}:1/{len(sets)}" for name in sets)
    run_tapir(
        *("train", "dvae", "tiny", f"--data={mixture}", f"--out={FOLDER}/dvae"),
        *(f"--loop.steps={DVAE_STEPS}", f"--loop.validation-samples={sized(512, 32)}"),
        *("--engine.precision=fp32", *sized([], ["--order.lanes=4"])),
    )
    models = [f"--dvae={FOLDER}/dvae", f"--bpe={FOLDER}/bpe"]
    for name in sets:
        run_tapir("tokenize", f"{FOLDER}/raw-{name}", f"{FOLDER}/tokens-{name}", *models, block)


def _scenes() -> list[str]:
    """Captions of shapes, about as many as one vendor's emoji."""
    return [pair.caption.decode() for pair in shapes_pairs(0, min(SCENES, 2000), 32, 0)]


def _pictures(vendor: str) -> Path:
    """A folder of a vendor's emoji without skin tones, PNG and TXT by code point."""
    folder = FOLDER / f"pictures-{vendor}"
    if not (folder / "whole").exists():
        pairs = (
            p for p in emoji_pairs(Path(".cache"), vendor) if p.caption.decode() == p.split_key
        )
        for pair in islice(pairs, PAIRS):
            write_atomic(folder / f"{pair.key}.png", pair.image)
            write_atomic(folder / f"{pair.key}.txt", pair.caption)
        write_atomic(folder / "whole", b"")
    return folder
