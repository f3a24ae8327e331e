"""A card of shipped models for people, as a model card of the Hugging Face hub."""

from generation.shipped import Card

_NAMES = {
    "image_loss": "loss of held-out pictures, nats per code",
    "shuffled_caption_loss": "the same with other captions",
    "psnr": "PSNR of reconstructions, dB",
    "codes_used": "codes used",
    "accuracy": "CLIP: right caption of a batch",
}


def readme_of(card: Card) -> str:
    """README.md: what it draws, on what it was trained, and the figures of all seeds."""
    seeds = [
        str(row["seed"]) + (" (shipped)" if row["seed"] == card.seed else "") for row in card.seeds
    ]
    score = card.score
    name = f"{score.name}, best of {score.candidates}, {len(score.captions)} held-out captions"
    rows = [(text, key) for key, text in _NAMES.items()] + [(name, "score")]
    table = [
        "| figure | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|" + "---|" * len(seeds),
        *(
            f"| {text} | " + " | ".join(_number(row.get(key)) for row in card.seeds) + " |"
            for text, key in rows
        ),
    ]
    return "\n".join(
        [
            "---",
            f"license: {card.license.split(',')[0].lower()}",
            "pipeline_tag: text-to-image",
            "---",
            f"# Tapir {card.name}: {card.title}",
            "",
            f"{card.parameters / 1e6:.1f} million parameters in 16 bits: dVAE, prior and CLIP, "
            "with their tokenizer.",
            "",
            f'`tapir sample "{score.captions[0]}" --weights {card.name}`',
            "",
            f"Trained on {card.source} ({card.license}), by `{card.command}`.",
            "It knows the words of `bpe/words.json` and draws nothing else.",
            "",
            *table,
            "",
            f"Draws: temperature {score.temperature:g}, guidance {score.guidance:g}, seed 0, fp32. "
            f"`make weights` trains all seeds again; tests draw the score again.",
            "",
        ]
    )


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
