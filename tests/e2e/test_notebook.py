"""examples/quickstart.ipynb runs as it stands, in few steps."""

from pathlib import Path

import pytest

from tests.harness import PATIENCE, ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("STEPS", "6")
    monkeypatch.setenv("PAIRS", "1500")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    place = {"metadata": {"path": str(tmp_path)}}
    wait = int(PATIENCE)
    client = NotebookClient(notebook, timeout=wait, startup_timeout=wait, resources=place)
    client.execute()
    shown = {
        cell.id: [kind for output in cell.outputs for kind in output.get("data", {})]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "image/png" in shown["draw"] and "image/png" in shown["plot"]
    assert (tmp_path / "runs" / "notebook" / "prior" / "model.safetensors").exists()
