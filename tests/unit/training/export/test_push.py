"""`tapir export --push` against a server with the hub's upload API."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cli.export import export
from core.errors import ConfigError, InputError, TapirError
from tests.harness import cold_tapir
from tests.support.hub import Hub, hub_server
from tests.unit.finished import write_models
from training.export.huggingface import import_parts
from training.export.push import files_to_push

CAPTIONS = ["a small red circle", "two blue squares"]
NAME = "somebody/shapes"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_models(tmp_path / "runs", CAPTIONS)
    return tmp_path / "runs"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process uploads to."""
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_repository_holds_the_folder_and_imports(runs: Path, tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "hub"
    export([str(runs), str(out), f"--push={NAME}", "--private"])
    assert hub.repositories[NAME] == _files(out) and hub.private[NAME]
    for path, content in hub.repositories[NAME].items():
        copy = tmp_path / "copy" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    import_parts(tmp_path / "copy", tmp_path / "back")
    for path in runs.rglob("*.*"):
        assert (tmp_path / "back" / path.relative_to(runs)).read_bytes() == path.read_bytes()


def test_a_failed_upload_is_repeated_by_the_same_command(
    runs: Path, tmp_path: Path, hub: Hub
) -> None:
    command = [str(runs), str(tmp_path / "hub"), f"--push={NAME}"]
    hub.broken = "/commit/"
    with pytest.raises(TapirError, match=r"was not uploaded \(.*; .*/hub is whole: the same") as up:
        export(command)
    assert up.value.exit_code == 1 and not hub.private[NAME]
    (tmp_path / "hub" / "README.md").write_text("edited")
    (tmp_path / "hub" / ".env").write_text("secret")
    hub.broken, sent = "", len(hub.requests)
    export(command)
    assert hub.repositories[NAME]["README.md"] == b"edited"
    assert ".env" not in hub.repositories[NAME]
    assert len(hub.repositories[NAME]) == len(files_to_push(tmp_path / "hub"))
    assert not [line for line in hub.requests[sent:] if line.startswith("PUT")]


@pytest.mark.parametrize("token", ["wrong", ""])
def test_a_token_that_may_not_write_is_refused(
    token: str, runs: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=r"refuses to write .* `hf auth login`, or set HF_TOKEN"):
        export([str(runs), str(tmp_path / "hub"), f"--push={NAME}"])
    assert hub.repositories == {}


def test_a_dry_run_shows_all_files_and_sends_nothing(
    runs: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hub"
    export([str(runs), str(out), f"--push={NAME}", "--dry-run"])
    shown = capsys.readouterr().out
    files = _files(out)
    for path, content in files.items():
        assert f"{len(content):,} bytes  {path}\n" in shown
    total = f"{sum(map(len, files.values())):,} bytes  in {len(files)} files to {NAME} (public,"
    assert total in shown and hub.requests == []


def test_wrong_flags_are_refused_before_the_work(runs: Path, tmp_path: Path, hub: Hub) -> None:
    out = str(tmp_path / "hub")
    cases = {
        ("--dry-run",): "give --push USER/NAME",
        ("--push=a/b/c",): "--push a/b/c: .*give USER/NAME",
        (f"--push={NAME}", "--to=openai-dvae"): "leave out --to openai-dvae",
        ("--dry-run", "--shard-gigabytes=0"): "(?s)^- --shard-gigabytes .*\n- --dry-run",
    }
    for flags, reason in cases.items():
        with pytest.raises((ConfigError, InputError), match=reason):
            export([str(runs), out, *flags])
    assert not Path(out).exists() and hub.requests == []


def test_a_folder_of_other_models_is_not_pushed(runs: Path, tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "hub"
    export([str(runs / "dvae"), str(out)])
    with pytest.raises(InputError, match="holds something already"):
        export([str(runs), str(out), f"--push={NAME}"])
    assert hub.requests == []


@pytest.mark.seconds
def test_the_command_line_pushes(runs: Path, tmp_path: Path) -> None:
    with hub_server() as hub:
        places = {"HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        out = str(tmp_path / "hub")
        text = cold_tapir("export", str(runs), out, f"--push={NAME}", **places)
        assert f"uploaded {hub.address}/{NAME}/commit/" in text
        assert hub.repositories[NAME] == _files(Path(out))
