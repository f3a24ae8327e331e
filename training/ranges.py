"""Steps and ranks as flags name them."""


def parse_steps(text: str) -> tuple[int, int]:
    """`20:25` -> (20, 25). Raises: ValueError."""
    first, last = map(int, text.split(":"))
    return first, last


def parse_ranks(text: str) -> list[int]:
    """`0,3` -> [0, 3], `all` -> none. Raises: ValueError."""
    return [] if text == "all" else [int(word) for word in text.split(",")]
