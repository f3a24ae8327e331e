"""The size of the models that come with Tapir."""

from pathlib import Path

from tests.house.rules import WEIGHTS_BYTES

FOLDER = "generation/weights"


def weights(root: Path) -> list[str]:
    """A problem if they are larger than everybody should download with the package."""
    total = sum(path.stat().st_size for path in (root / FOLDER).rglob("*.safetensors"))
    if total <= WEIGHTS_BYTES:
        return []
    return [
        f"{FOLDER}/:1: {total / 1e6:.1f} MB of shipped weights ({total:,} bytes), more than "
        f"{WEIGHTS_BYTES:,}; make a recipe of workflow/weights/recipes.py smaller"
    ]
