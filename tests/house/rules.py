"""Every limit of the house checks."""

PRODUCT = (
    *("cli", "workflow", "serving", "generation", "planning", "training", "data_pipeline"),
    *("models", "parallel", "checkpoint", "core", "cluster", "tapir"),
)
"""Top-level packages and modules that are installed."""

MEDIAN_LINES, FILE_LINES, FUNCTION_LINES, FOLDER_FILES = 150, 350, 50, 14
"""Of the product: median and longest file, longest function, Python files in one folder."""

TEST_FILE_LINES, TEST_FOLDER_FILES = 600, 20
"""Of tests/ and bench/: longest file, Python files in one folder."""

WEIGHTS_BYTES = 25_000_000
"""Of the models that come with Tapir, all sets together."""

UNIT_EXTRA = ("bench", "repository")
"""Folders of tests/unit beside one folder per product package."""

BANNED = (
    *("found", "wanted", "lies", "said", "room", "spare", "settled"),
    *("way", "behind", "whoever", "kin"),
)
"""Words that no name may hold: write the field's term instead, e.g. rows, expected, buffer."""

BANNED_LIMIT = 0
"""A ratchet: how many names may still hold one of BANNED; lower it, never raise it."""
