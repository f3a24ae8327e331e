"""The model card: README.md of an exported folder, from the facts of the run folders."""

from collections.abc import Mapping
from typing import Any

from core.files.atomic import Json
from training.export.transformers import SIZES, loads_elsewhere
from training.export.weights import Weights

_WHAT = {
    "dvae": "image tokenizer: pictures <-> a grid of codes",
    "prior": "autoregressive transformer over text and image tokens",
    "clip": "contrastive model that ranks candidates",
    "tokenizer": "byte-pair encoding of captions",
}
_UNKNOWN = "not known"
_ELSEWHERE = """Without Tapir, by `transformers`:

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, subfolder="tokenizer")
captions = ["a caption"]
text = model.text_ids(tokenizer, captions, candidates=4)
noise = model.keyed_noise(captions, candidates=4, seed=0)  # the draws of tapir sample
pictures = model.pictures(model.generate(text, logits_processor=[noise]))  # (4, 3, S, S)
```"""


def model_card(name: str, index: Json, models: Mapping[str, Weights]) -> str:
    """The card as Markdown, with the hub's front matter."""
    parts = index["parts"]
    text_to_image = {"dvae", "prior", "tokenizer"} <= parts.keys()
    library = "transformers" if loads_elsewhere(models) else "tapir"
    front = [f"library_name: {library}"]
    front += ["pipeline_tag: text-to-image"] if text_to_image else []
    sections = [
        "\n".join(["---", *front, "tags: [tapir, dall-e]", "---"]),
        f"# {name}",
        f"Trained and exported by Tapir {index['tapir_version']} (an implementation of "
        "arXiv 2102.12092). Weights are fp32 safetensors; no file is a pickle.",
        _table(
            ["part", "what it is", "size", "files"], [_part(n, row) for n, row in parts.items()]
        ),
        "## Sizes",
        _table(["part", "settings"], [[s, _settings(m.config)] for s, m in models.items()]),
        "## Training",
        _training(models),
        "## What belongs together",
        "sha256 of each part's weights in Tapir's run folders, and of what it was trained with:",
        _table(["part", "sha256", "trained with"], [_ties(n, r, models) for n, r in parts.items()]),
        "## Use",
        _use(name, parts, text_to_image),
        *([_ELSEWHERE] if text_to_image and models["dvae"].stage in SIZES else []),
    ]
    return "\n\n".join(sections) + "\n"


def _part(name: str, row: Json) -> list[str]:
    size = (
        f"{row['parameters']:,} parameters" if "parameters" in row else f"{row['entries']} entries"
    )
    files = row.get("files", ["tokenizer.json"])
    shown = f"{name}/{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return [name, _WHAT[name], size, shown]


def _training(models: Mapping[str, Weights]) -> str:
    rows = {
        "data": lambda m: m.run.get("data"),
        "fingerprint of the data": lambda m: m.facts.get("raw"),
        "initial weights": lambda m: _initial(m.facts.get("history")),
        "optimiser steps": lambda m: m.facts.get("step"),
        "batch": lambda m: m.run.get("loop", {}).get("global_batch_size"),
        "seed": lambda m: m.run.get("loop", {}).get("seed"),
        "learning rate": lambda m: m.run.get("optim", {}).get("lr"),
        "averaged weights": lambda m: m.run.get("optim", {}).get("ema"),
        "mesh": lambda m: _settings(m.run.get("mesh", {})),
        "engine": lambda m: m.run.get("engine", {}).get("name"),
        "precision": lambda m: m.run.get("engine", {}).get("precision"),
        "numerics": lambda m: _settings(m.facts.get("numerics", {})),
        "rank of compressed gradients": lambda m: m.run.get("compress", {}).get("rank"),
        "held-out losses": lambda m: _losses(m.facts.get("validation", {})),
    }
    cells = [[name, *(_text(of(m)) for m in models.values())] for name, of in rows.items()]
    return _table(["", *models], cells)


def _initial(history: list[Json] | None) -> str | None:
    """What the run's history says of its initial weights; older runs have none."""
    if history is None:
        return None
    started = [event for event in history if event["event"] == "init"]
    return f"{started[0]['from']} (`{started[0]['digest']}`)" if started else "drawn"


def _losses(row: Json) -> str:
    shown = {k: v for k, v in row.items() if isinstance(v, float) and k != "seconds"}
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(shown.items()))


def _ties(name: str, row: Json, models: Mapping[str, Weights]) -> list[str]:
    facts = models[name].facts if name in models else {}
    with_ = [f"{other} `{facts[other]}`" for other in ("dvae", "tokenizer") if other in facts]
    return [name, f"`{row['sha256']}`", "<br>".join(with_)]


def _use(name: str, parts: Json, text_to_image: bool) -> str:
    lines = ["```", f"tapir import {name} runs/{name}"]
    if text_to_image:
        flags = [
            f"--{part} runs/{name}/{part}" for part in ("prior", "dvae", "clip") if part in parts
        ]
        lines.append(f'tapir sample "a caption" {" ".join(flags)} --bpe runs/{name}/bpe')
    lines += ["```"]
    return "\n".join(lines)


def _settings(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def _text(value: Any) -> str:
    return str(value) if value not in (None, "", {}) else _UNKNOWN


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
