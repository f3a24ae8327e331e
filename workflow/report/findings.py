"""What a run's figures mean, in plain sentences: what was learned, and where it fails."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from core.files.atomic import Json
from workflow.report.plots import best_of_counts

_CLEAR = 0.01
"""Part of a loss that a difference must have, not to be called none."""
_FEW_WORDS = 3
"""Captions with a word, at least, for a sentence about it."""
_MOST_WORDS = 3
_SMALL = frozenset(("a", "an", "and", "at", "in", "is", "it", "of", "on", "the", "to", "with"))
"""Words that say nothing about a picture."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence of the report."""

    kind: Literal["learned", "fails", "note"]
    text: str


def findings_of(summary: Json, rows: Sequence[Json], scores: Json | None) -> list[Finding]:
    """Sentences about a finished run, what was learned first.

    `rows` are those of candidates.json: captions, best first their candidates' scores and, where
    pictures can be checked, whether each is `exact`.
    """
    findings = [*_prior(summary["prior"]), *_pictures(summary), *_ranking(summary)]
    findings += [*_words(rows), *_scores(scores)]
    return sorted(findings, key=lambda each: ("learned", "fails", "note").index(each.kind))


def _prior(prior: Mapping[str, Any]) -> list[Finding]:
    """Is the loss below what a prior has that ignores captions, or the codes before?"""
    loss, findings = prior["validation_loss"], list[Finding]()
    shuffled, alone = prior.get("shuffled_caption_loss"), prior.get("per_position_entropy")
    if shuffled is not None:
        figures = f"(held-out loss {loss:.3g} nats a code, and {shuffled:.3g} with another caption)"
        if shuffled - loss > _CLEAR * shuffled:
            text = f"The prior reads captions: the right one makes a picture likelier {figures}."
            findings.append(Finding(kind="learned", text=text))
        else:
            text = (
                f"The prior does not read captions yet: another caption costs it nothing {figures}."
                " Train it longer, or on more pairs."
            )
            findings.append(Finding(kind="fails", text=text))
    if alone is not None:
        figures = f"({loss:.3g} nats a code, and {alone:.3g} from each position's counts alone)"
        if alone - loss > _CLEAR * alone:
            text = f"The prior knows which codes go together {figures}."
            findings.append(Finding(kind="learned", text=text))
        else:
            text = f"The prior has learned no more than how often each code occurs {figures}."
            findings.append(Finding(kind="fails", text=f"{text} Train it longer."))
    return findings


def _pictures(summary: Json) -> list[Finding]:
    """Exact captions: against chance, and against what the dVAE can show at all."""
    accuracy = summary.get("caption_accuracy")
    if not accuracy:
        return []
    counts = best_of_counts(accuracy)
    whole = [n for n in counts if f"best_of_{n}_prompts" not in accuracy] or list(counts)
    best, share, chance = max(whole), counts[max(whole)], accuracy["chance"]
    limit = accuracy["reconstruction"]
    text = (
        f"Of {accuracy['prompts']} held-out captions, {share:.0%} are drawn exactly as they say "
        f"(the best of {best} by CLIP); by chance it would be {chance:.0%}."
    )
    findings = [Finding(kind="learned" if share > chance else "fails", text=text)]
    if limit - share > _CLEAR:
        text = (
            f"{limit - share:.0%} of captions fail although the dVAE could show them: the prior or "
            f"the ranking is at fault ({limit:.0%} of true pictures survive the dVAE)."
        )
        findings.append(Finding(kind="fails", text=text))
    if 1 - limit > _CLEAR:
        text = (
            f"The dVAE loses {1 - limit:.0%} of the true pictures: no prior can draw those. Train "
            "the dVAE longer, or give it more codes."
        )
        findings.append(Finding(kind="fails", text=text))
    return findings


def _ranking(summary: Json) -> list[Finding]:
    """Does ranking by CLIP help, and guidance?"""
    findings, accuracy = list[Finding](), summary.get("caption_accuracy") or {}
    counts = best_of_counts(accuracy)
    if len(counts) > 1:
        one, most = counts[min(counts)], max(counts)
        gain = counts[most] - one
        shares = f"{counts[most]:.0%} of cases, a single one in {one:.0%}"
        text = f"the best of {most} is exact in {shares}."
        if gain > _CLEAR:
            findings.append(Finding(kind="learned", text=f"Drawing more and ranking helps: {text}"))
        else:
            findings.append(
                Finding(kind="fails", text=f"Ranking more candidates does not help: {text}")
            )
    guided = {float(scale): share for scale, share in accuracy.get("guidance", {}).items()}
    if guided and max(guided.values()) > 0:
        scale = max(guided, key=lambda each: (guided[each], -each))
        text = f"Of the guidance scales, {scale:g} is best: {guided[scale]:.0%} of single samples."
        findings.append(Finding(kind="note", text=text))
    accuracy = summary["clip"]["accuracy"]
    text = (
        f"CLIP picks the right caption of 64 for {accuracy:.0%} of held-out pictures (chance: 2%)."
    )
    findings.append(Finding(kind="learned" if accuracy > 2 / 64 else "fails", text=text))
    return findings


def _words(rows: Sequence[Json]) -> list[Finding]:
    """Words whose captions fail most often, if the pictures were checked."""
    right = defaultdict[str, list[bool]](list)
    for row in rows:
        for word in set(row["caption"].lower().split()) - _SMALL if row.get("exact") else ():
            right[word].append(row["exact"][0])
    checked = [row["exact"][0] for row in rows if row.get("exact")]
    if not checked or all(checked):
        return []
    usual = sum(checked) / len(checked)
    shares = {w: sum(each) / len(each) for w, each in right.items() if len(each) >= _FEW_WORDS}
    worst = sorted((share, word) for word, share in shares.items() if share < usual)
    if not worst:
        return []
    named = [f"“{w}” ({len(right[w]) - sum(right[w])} of {len(right[w])})" for _, w in worst]
    text = f"Captions with these words fail most often: {', '.join(named[:_MOST_WORDS])}."
    return [Finding(kind="fails", text=text)]


def _scores(scores: Json | None) -> list[Finding]:
    """FID and IS without blur."""
    if not scores:
        return []
    row = min(scores["rows"], key=lambda each: each["radius"])
    label = scores["label"][:1].upper() + scores["label"][1:]
    text = f"{label}: FID {row['fid']:.4g} (lower is better), IS {row['is']:.4g}."
    return [Finding(kind="note", text=text)]


def worst_rows(rows: Sequence[Json], most: int) -> list[Json]:
    """Captions whose best-ranked picture is wrong, else those that CLIP likes least; worst first.

    A wrong one is worse if fewer of its candidates are right, and then if CLIP was surer of it. A
    caption that occurs several times is shown once.
    """
    if any(row.get("exact") for row in rows):
        wrong = [row for row in rows if row.get("exact") and not row["exact"][0]]
        worst = sorted(wrong, key=lambda row: (sum(row["exact"]), -row["scores"][0]))
    else:
        worst = sorted(rows, key=lambda row: row["scores"][0])
    firsts: dict[str, Json] = {}
    for row in worst:
        firsts.setdefault(row["caption"], row)
    return list(firsts.values())[:most]
