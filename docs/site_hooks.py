"""Pages that the docs site takes from elsewhere: help of verbs, root files, decisions, llms.txt.

MkDocs calls the functions `on_*` while `make docs` runs; no other code imports this module.
"""

import contextlib
import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from cli.serving.study import PARTS as STUDY_PARTS
from generation.evaluation.suites.registry import SUITES
from tapir import VERBS
from training.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
WIDTH = "100"
"""Columns of a verb's help, and of the prose around it."""
COPIED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Page of the site -> file at the root of the repository."""
VERBS_PAGE = "reference/verbs.md"
"""In the repository it is a short page; on the site it holds the help of all verbs."""
HISTORY = ("decisions/", "LOG.md", "changelog.md")
"""Pages that search ranks below the guides."""


def on_config(config: Any) -> Any:
    """Replace the entry `decisions/` of the navigation by all decisions, in their order."""
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    for group in config.nav:
        for entries in group.values():
            for entry in entries:
                if entry.get("Decisions") == "decisions/":
                    entry["Decisions"] = [f"decisions/{name}" for name in names]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not stored in docs/."""
    for page, source in COPIED.items():
        content = links_inside((ROOT / source).read_text())
        files.append(File.generated(config, page, content=content))
    text = (ROOT / "llms.txt").read_text()
    files.append(File.generated(config, "llms.txt", content=links_to_html(text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill the page of the verbs; in searches it ranks high, and history low."""
    if page.file.src_uri.startswith(HISTORY):
        page.meta["search"] = {"boost": 0.2}
    if page.file.src_uri != VERBS_PAGE:
        return markdown
    page.meta["search"] = {"boost": 2}
    return verbs_page()


def links_inside(text: str) -> str:
    """Links of a file at the root, as a page of docs/ writes them."""
    for page, source in COPIED.items():
        text = text.replace(f"]({source})", f"]({page})")
    return re.sub(r"\]\(docs/", "](", text)


def links_to_html(text: str) -> str:
    """Links of llms.txt to sources, as links to pages of the site."""
    return re.sub(r"\]\(docs/([^)]+)\.md\)", r"](\1.html)", text)


def verbs_page() -> str:
    """The --help of every verb and preset, as a user sees it."""
    os.environ.update(COLUMNS=WIDTH, NO_COLOR="1", TERM="dumb")
    parts = [
        "# Every flag of every verb\n\nWhat `tapir VERB --help` prints, taken from the code when "
        "this site is built.\n"
    ]
    for verb, (target, summary) in VERBS.items():
        module, function = target.split(":")
        run = getattr(importlib.import_module(module), function)
        parts.append(f"## tapir {verb}\n\n{summary}\n\n{_block(_help(run, []))}")
        if verb == "train":
            parts += [
                f"### tapir train {stage} {preset}\n\n{_block(_help(run, [stage, preset]))}"
                for stage, presets in PRESETS.items()
                for preset in presets
            ]
        if verb == "study":
            parts += [
                f"### tapir study {name}\n\n{_block(_help(run, [name]))}" for name in STUDY_PARTS
            ]
        if verb == "evaluate":
            parts += [
                f"### tapir evaluate --suite {name}\n\n{suite.text}\n\n"
                f"{_block(_help(run, ['--suite', name]))}"
                for name, suite in SUITES.items()
            ]
    return "\n".join(parts)


def _help(run: Any, arguments: list[str]) -> str:
    """What a verb prints for --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run([*arguments, "--help"])
    return printed.getvalue()


def _block(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return "\n".join(["```text", *lines, "```", ""])
