"""docs/troubleshooting.md quotes only messages that exist in the code."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.harness import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
PACKAGES = (
    *("core", "cluster", "checkpoint", "parallel", "data_pipeline", "training", "generation"),
    *("serving", "workflow", "cli"),
)
PLACEHOLDER = re.compile(r"%[-+.0-9,]*[a-z]")


@cache
def _messages() -> tuple[str, ...]:
    """All string literals of the code, with … in place of values."""
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    return tuple(text for path in files for text in _texts(ast.parse(path.read_text())))


def _texts(tree: ast.AST) -> list[str]:
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(x.value) if isinstance(x, ast.Constant) else "…" for x in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(PLACEHOLDER.sub("…", node.value).replace("%%", "%"))
    return texts


def _is_in_the_code(quote: str) -> bool:
    pattern = ".*".join(map(re.escape, quote.split("…")))
    return any(re.search(pattern, text, re.DOTALL) for text in _messages())


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    assert len(quote.replace("…", "").strip()) > 15, "too short to search for"
    assert _is_in_the_code(quote)


def test_a_message_that_the_code_lacks_is_seen() -> None:
    assert len(QUOTES) > 40
    assert not _is_in_the_code("the source … holds no pears: no images with captions…")


def test_the_page_is_linked() -> None:
    assert "docs/troubleshooting.md" in (ROOT / "README.md").read_text()
    assert all(Path(ROOT, "docs", name).exists() for name in re.findall(r"\]\((\w+\.md)\)", PAGE))
