"""Every tensor factory names its device: one that does not uses the CPU or the default device."""

import ast

import pytest

from tests.harness import ROOT

FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def _bare(source: str) -> list[int]:
    """Lines of calls to torch's factories that name no device."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        named = any(keyword.arg in ("device", None) for keyword in node.keywords)
        if of_torch and node.func.attr in FACTORIES and not named:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "folder", ["checkpoint", "generation", "models", "parallel", "serving", "training", "workflow"]
)
def test_tensor_factories_name_their_device(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    bare = [
        f"{path.relative_to(ROOT)}:{line}" for path in files for line in _bare(path.read_text())
    ]
    assert not bare, bare


def test_a_bare_factory_is_seen() -> None:
    assert _bare("import torch\nx = torch.zeros(3)\ny = torch.zeros(3, device='cpu')") == [2]
    assert _bare("torch.tensor([torch.arange(3)], device=d)") == [1]
