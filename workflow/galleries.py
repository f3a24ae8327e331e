"""Pictures that suites wrote beside their suite.json, for report.html and leaderboard.md."""

import json
from pathlib import Path

from core.errors import CorruptError
from core.files.atomic import Json
from generation.evaluation.suites.protocol import GALLERY


def galleries(folder: Path, suites: list[str]) -> list[Json]:
    """The galleries in these folders, whose paths are relative to `folder`.

    Each has its suite's `folder`, a title, a text, and rows of caption and path.
    Raises: CorruptError for a damaged one.
    """
    shown = []
    for name in suites:
        path = folder / name / GALLERY
        if not path.is_file():
            continue
        try:
            body = json.loads(path.read_bytes())
            rows = [
                {"caption": str(row["caption"]), "path": (Path(name) / row["file"]).as_posix()}
                for row in body["rows"]
            ]
            texts = {key: str(body[key]) for key in ("title", "text")}
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptError(f"{path} is damaged: {error!r}; delete it") from error
        shown.append({"folder": name, **texts, "rows": rows})
    return shown
