"""`python -m workflow.weights [shapes emoji] --seeds 0 1 2`: train and write shipped models."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from core.config import check
from core.errors import TapirError
from core.flags import FLAT, parse
from core.log import LOG, set_up_logging
from generation.shipped import WEIGHTS
from workflow.weights.make import make_weights
from workflow.weights.recipes import RECIPES, longer, miniature


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Which shipped models to train."""

    names: tyro.conf.Positional[tuple[str, ...]] = tuple(RECIPES)
    """Sets of models."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to train; that with the lowest held-out loss is shipped."""
    steps: float = 1.0
    """Times the recipe's steps of every stage."""
    work: Path = Path("runs/weights")
    """Folder of the training runs; the same command goes on there."""
    out: Path = WEIGHTS
    """Folder of the shipped models."""
    miniature: bool = False
    """Seconds instead of hours: a test of the plumbing."""

    def problems(self) -> list[str]:
        unknown = [name for name in self.names if name not in RECIPES]
        problems = [f"unknown {name!r}; known are {', '.join(RECIPES)}" for name in unknown]
        if not self.seeds or self.steps <= 0:
            problems.append("give at least one of --seeds, and --steps above 0")
        return problems


def main(arguments: list[str]) -> None:
    """Train, score and write the sets one after the other."""

    def run(config: Annotated[WeightsConfig, FLAT] = WeightsConfig()) -> None:
        """Train shipped models from freely licensed pictures, and write them with their cards.

        Args:
            config: settings
        """
        check(config.problems())
        flags = "" if config.steps == 1 else f" STEPS={config.steps:g}"
        for name in config.names:
            recipe = longer(RECIPES[name], config.steps)
            recipe = miniature(recipe) if config.miniature else recipe
            command = f"make weights SETS={name}{flags}"
            card = make_weights(recipe, config.seeds, config.work, config.out, command)
            LOG.info("%s: %s %.4g, in %s", name, card.score.name, card.score.value, config.out)

    parse(run, arguments, "weights")


if __name__ == "__main__":
    set_up_logging()
    try:
        main(sys.argv[1:])
    except TapirError as error:
        print(f"tapir: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
