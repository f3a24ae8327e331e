"""Upload an exported folder to a repository of the Hugging Face hub.

The library `huggingface_hub` takes the token of `hf auth login` or HF_TOKEN, and the hub's address
from HF_ENDPOINT. All files become one commit; files that the hub has already are not sent again.
"""

from collections.abc import Mapping
from pathlib import Path

from core.errors import CorruptError, InputError, TapirError
from core.files.atomic import unseal
from core.log import LOG

_REFUSED = (401, 403)


def check_repository(repository: str) -> None:
    """Check the name of a repository, before the work. Raises: InputError."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 - half a second
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push {repository}: {error}; give USER/NAME") from error


def holds_already(index: Path, digests: Mapping[str, str]) -> bool:
    """True if an exported folder's index names exactly these parts, by their sha256."""
    try:
        parts = unseal(index.read_bytes(), str(index))["parts"]
        return {name: row["sha256"] for name, row in parts.items()} == dict(digests)
    except (OSError, CorruptError, KeyError, TypeError, AttributeError):
        return False


def files_to_push(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones, from the folder."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.parts)]


def listing(folder: Path, repository: str, private: bool) -> str:
    """What `push` would upload, in lines."""
    sizes = {path: (folder / path).stat().st_size for path in files_to_push(folder)}
    rows = [f"{size:>15,} bytes  {path}" for path, size in sizes.items()]
    seen_by = "private, if it is new" if private else "public, if it is new"
    total = f"{sum(sizes.values()):>15,} bytes  in {len(sizes)} files to {repository} ({seen_by})"
    return "\n".join([*rows, total])


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder as one commit; returns its address.

    `private`: make a new repository private.
    Raises: InputError if the hub refuses the token; TapirError if it cannot be reached or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415 - half a second

    api = HfApi()
    files = [
        CommitOperationAdd(path_in_repo=path.as_posix(), path_or_fileobj=str(folder / path))
        for path in files_to_push(folder)
    ]
    LOG.info("uploading %d files to %s", len(files), repository)
    try:
        name = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        commit = api.create_commit(name, files, commit_message="Export of Tapir")
    except Exception as error:  # the library's errors have no base of their own
        raise _explained(error, folder, repository) from error
    return str(commit.commit_url)


def _explained(error: Exception, folder: Path, repository: str) -> TapirError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    if status in _REFUSED:
        return InputError(
            f"the hub refuses to write {repository} ({reason}); log in by `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        )
    return TapirError(
        f"{repository} was not uploaded ({reason}); {folder} is whole: the same command tries "
        "again, and sends what the hub has not"
    )
