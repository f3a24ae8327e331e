"""Figures of a verdict in plain words."""

from typing import Any

_OVERFIT = 0.15
"""Share of the held-out loss by which the training loss is lower, from which it is told."""
_LEARNED = 0.03
"""The same, below which captions that change nothing may only need more steps."""


def findings_of(figures: dict[str, Any]) -> tuple[str, list[str]]:
    """("yes", "partly", "no" or "unknown", findings): were the pairs enough?

    yes: held-out pictures fit their own captions better than others, beyond chance, and drawn
    pictures are no copies. partly: they do, and many drawn pictures are copies. unknown: they do
    not, and training pictures have no lower loss either, so that training ended too early to tell.
    """
    follows = figures["caption_gain"] is not None and figures["caption_gain_low95"] > 0
    copies = [name for name in ("validation", "train") if _is_copying(figures, name)]
    early = figures["caption_gain"] is not None and _overfit(figures) < _LEARNED
    enough = ("partly" if copies else "yes") if follows else "unknown" if early else "no"
    answers = {
        "yes": "The pairs were enough: new captions change the pictures, and they are no copies.",
        "partly": "The pairs were enough to follow captions, but not to draw much that is new.",
        "no": "The pairs were not enough: what new captions say does not change the pictures.",
        "unknown": "Training ended too early to tell: captions do not change the pictures yet, and "
        "pictures that were trained on have hardly a lower loss than new ones. Give more minutes.",
    }
    texts = [answers[enough], _caption_text(figures, follows), *_copy_texts(figures)]
    if over := _overfit_text(figures):
        texts.append(over)
    if figures["held_out_twins"]:
        texts.append(
            f"{figures['held_out_twins']} of {figures['held_out']} held-out pictures are also "
            "training pictures: pack with --duplicates or --near to leave out repeated ones."
        )
    if enough in ("partly", "no"):
        texts.append(
            "More pairs help most, then captions that say what differs between the pictures; "
            "more minutes help if the validation loss still falls at the end."
        )
    return enough, texts


def _caption_text(figures: dict[str, Any], follows: bool) -> str:
    gain = figures["caption_gain"]
    if gain is None:
        return "All captions are equal, so nothing can depend on them."
    low, high = figures["caption_gain_low95"], figures["caption_gain_high95"]
    result = "beyond chance" if follows else "not beyond chance"
    return (
        f"Loss of {figures['held_out']} held-out pictures: {figures['loss']:.3f} nats per code "
        f"with their own captions, {figures['shuffled_caption_loss']:.3f} with other captions: a "
        f"gain of {gain:.3f} (95%: {low:.3f} to {high:.3f}), {result}."
    )


def _copy_texts(figures: dict[str, Any]) -> list[str]:
    names = {"validation": "held-out", "train": "training"}
    return [
        f"Of {figures[f'drawn_{split}']} pictures drawn for {name} captions, "
        f"{figures[f'copies_{split}']} are nearer to a training picture than 95% of real new "
        f"pictures are (chance: {0.05 * figures[f'drawn_{split}']:.0f}): "
        + ("memorised." if _is_copying(figures, split) else "no sign of copying.")
        for split, name in names.items()
    ]


def _is_copying(figures: dict[str, Any], split: str) -> bool:
    return bool(figures[f"copies_{split}_low95"] > 0.05)


def _overfit(figures: dict[str, Any]) -> float:
    """Share of the held-out loss by which the training loss is lower."""
    return float(1 - figures["train_loss"] / figures["loss"])


def _overfit_text(figures: dict[str, Any]) -> str:
    lower = _overfit(figures)
    if lower < _OVERFIT:
        return ""
    return (
        f"The loss of training pictures is {figures['train_loss']:.3f}, {lower:.0%} below that of "
        "held-out ones: the model learned its pairs by heart."
    )
