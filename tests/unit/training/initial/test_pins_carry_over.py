"""Pins of carried weights: on another device, and the rules at their limits."""

import pytest
import torch

from parallel.device import CPU
from training.initial.carry_over import (
    Vocabularies,
    carry,
    extend_rows,
    interpolate_grid,
    interpolate_rows,
    rows_by_pieces,
    table,
)

SAME = Vocabularies()


def test_rows_are_made_where_the_stored_ones_are() -> None:
    stored = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    with torch.device("meta"):
        means, longer = rows_by_pieces(stored, [[1], [0, 1]]), extend_rows(stored, 3)
    assert means.device == longer.device == CPU
    assert means.tolist() == [[3.0, 6.0], [2.0, 4.0]]
    assert longer.tolist() == [[1.0, 2.0], [3.0, 6.0], [3.0, 6.0]]


def test_each_channel_is_interpolated_alone() -> None:
    """Cells of width 1 at 0.5 and 1.5; of half of it at 0.25 to 1.75, constant past the centres."""
    stored = torch.tensor([[0.0, 8.0], [4.0, 0.0]])
    wide = [[0.0, 8.0], [1.0, 6.0], [3.0, 2.0], [4.0, 0.0]]
    assert interpolate_rows(stored, 4).tolist() == wide
    grid = torch.tensor([[0.0, 8.0], [4.0, 8.0], [0.0, 0.0], [4.0, 0.0]])
    across, down = [0.0, 1.0, 3.0, 4.0], [8.0, 6.0, 2.0, 0.0]
    assert interpolate_grid(grid, 16).tolist() == [[x, y] for y in down for x in across]


@pytest.mark.parametrize(
    ("name", "stored", "shape", "how", "rule"),
    [
        ("clip.place.weight", (8, 4), (16, 4), "new", "another shape"),
        ("clip.place.weight", (16, 4), (8, 4), "new", "another shape"),
        ("clip.place.weight", (1, 5), (9, 5), "resized", "interpolated in 2-D"),
        ("block000.q.weight", (16, 4), (9, 4), "new", "another shape"),
        ("block000.q.weight", (9, 4), (9, 4), "taken", "same shape"),
        ("embedding.row.weight", (9, 4), (9,), "new", "another width"),
        ("embedding.row.weight", (9, 4), (9, 5), "new", "another width"),
        ("embedding.row.weight", (2, 4), (3, 4), "resized", "interpolated linearly"),
        ("embedding.pad.weight", (2, 4), (3, 4), "resized", "first positions"),
        ("head.text.bias", (4,), (3,), "resized",
         "2 rows by token string, 1 means of the rows of their pieces"),
        ("head.image.bias", (4,), (4,), "new", "codes of another dVAE"),
    ],
)  # fmt: skip
def test_rules_of_a_model_with_other_words_and_codes(
    name: str, stored: tuple[int, ...], shape: tuple[int, ...], how: str, rule: str
) -> None:
    by = Vocabularies(pieces=[[1], [0], [0, 3]], same_codes=False)
    carried = carry({name: shape}, {name: stored}, by)[name]
    assert (carried.how, carried.rule) == (how, rule)
    assert (carried.name, carried.stored, carried.shape) == (name, stored, shape)
    if carried.change is not None:
        assert carried.change(torch.ones(stored)).equal(torch.ones(shape))


def test_columns_of_the_table_are_aligned() -> None:
    stored: dict[str, tuple[int, ...]] = {"embedding.row.weight": (8, 4), "step": ()}
    expected = {"embedding.row.weight": (16, 4), "a": (), "b.x": (3,), "b.y": (3,), "b.z": (1, 2)}
    assert table(carry(expected, stored, SAME), stored) == [
        "tensor                stored     here    how",
        "embedding.row.weight  8 x 4      16 x 4  resized: interpolated linearly",
        "a                     -          1       new: not stored",
        "b.*                   3 tensors          new: not stored",
        "step                  1          -       left: this model has none",
    ]
