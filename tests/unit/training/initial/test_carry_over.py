"""The rules by which weights are carried over from one model to another, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.tensors import TensorFiles
from core.errors import CorruptError
from core.storage.store import FolderStore
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
OTHERS = Vocabularies(pieces=[[1], [0], [0, 3]], same_codes=False)
BY_PIECES = "2 rows by token string, 1 means of the rows of their pieces"
NUMBER: tuple[int, ...] = ()
"""The shape of a tensor without dimensions."""


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_rows_by_pieces_copies_one_piece_and_averages_several() -> None:
    stored = torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.1, 0.7]])
    made = rows_by_pieces(stored, [[2], [0, 1], [0], [0, 0, 1, 2]])
    assert torch.equal(made[0], stored[2]) and torch.equal(made[2], stored[0])
    assert made[1].tolist() == [2.0, 4.0]
    assert torch.allclose(made[3], torch.tensor([1.275, 2.675]), atol=1e-6)
    biases = rows_by_pieces(torch.tensor([1.0, 4.0]), [[1], [0, 1]])
    assert biases.tolist() == [4.0, 2.5]


def test_rows_of_a_grid_are_interpolated_between_the_centres_of_cells() -> None:
    assert interpolate_rows(column(0, 4), 4).T.tolist() == [[0, 1, 3, 4]]
    assert interpolate_rows(column(0, 1, 2, 5), 2).T.tolist() == [[0.5, 3.5]]
    assert torch.equal(interpolate_rows(column(3, 1, 7), 3), column(3, 1, 7))


def test_each_channel_is_interpolated_alone() -> None:
    """Cells of width 1 at 0.5 and 1.5; of half of it at 0.25 to 1.75, constant past the centres."""
    stored = torch.tensor([[0.0, 8.0], [4.0, 0.0]])
    wide = [[0.0, 8.0], [1.0, 6.0], [3.0, 2.0], [4.0, 0.0]]
    assert interpolate_rows(stored, 4).tolist() == wide
    grid = torch.tensor([[0.0, 8.0], [4.0, 8.0], [0.0, 0.0], [4.0, 0.0]])
    across, down = [0.0, 1.0, 3.0, 4.0], [8.0, 6.0, 2.0, 0.0]
    assert interpolate_grid(grid, 16).tolist() == [[x, y] for y in down for x in across]
    assert torch.equal(interpolate_grid(grid, 4), grid)


def test_longer_texts_repeat_the_last_position() -> None:
    assert extend_rows(column(1, 2, 3), 2).T.tolist() == [[1, 2]]
    assert extend_rows(column(1, 2, 3), 5).T.tolist() == [[1, 2, 3, 3, 3]]


def test_rows_are_made_where_the_stored_ones_are() -> None:
    stored = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    with torch.device("meta"):
        means, longer = rows_by_pieces(stored, [[1], [0, 1]]), extend_rows(stored, 3)
    assert means.device == longer.device == CPU
    assert means.tolist() == [[3.0, 6.0], [2.0, 4.0]]
    assert longer.tolist() == [[1.0, 2.0], [3.0, 6.0], [3.0, 6.0]]


@pytest.mark.parametrize(
    ("name", "stored", "shape", "by", "how", "rule"),
    [
        ("block000.q.weight", (4, 4), (4, 4), SAME, "taken", "same shape"),
        ("block000.q.weight", (9, 4), (9, 4), OTHERS, "taken", "same shape"),
        ("block000.q.weight", (4, 4), (8, 4), SAME, "new", "another shape"),
        ("block000.q.weight", (16, 4), (9, 4), SAME, "new", "another shape"),
        ("block000.q.weight", None, (4, 4), SAME, "new", "not stored"),
        ("embedding.text.table.weight", (9, 4), (9, 4), SAME, "taken", "same shape"),
        ("embedding.text.table.weight", (9, 4), (3, 4), OTHERS, "resized", BY_PIECES),
        ("embedding.text.table.weight", (9, 3), (3, 4), OTHERS, "new", "another width"),
        ("head.text.bias", (9,), (3,), OTHERS, "resized", BY_PIECES),
        ("clip.words.weight", (9, 4), (3, 4), OTHERS, "resized", BY_PIECES),
        ("embedding.image.table.weight", (9, 4), (9, 4), SAME, "taken", "same shape"),
        ("embedding.image.table.weight", (9, 4), (9, 4), OTHERS, "new", "codes of another dVAE"),
        ("head.image.bias", (9,), (9,), OTHERS, "new", "codes of another dVAE"),
        ("embedding.row.weight", (8, 4), (16, 4), SAME, "resized", "interpolated linearly"),
        ("embedding.column.weight", (8, 4), (4, 4), SAME, "resized", "interpolated linearly"),
        ("embedding.row.weight", (9, 4), (9,), SAME, "new", "another width"),
        ("embedding.row.weight", (9, 4), (9, 5), SAME, "new", "another width"),
        ("embedding.text_position.weight", (8, 4), (16, 4), SAME, "resized", "first positions"),
        ("embedding.pad.weight", (8, 4), (4, 4), SAME, "resized", "first positions"),
        ("clip.word_place.weight", (8, 4), (4, 4), SAME, "resized", "first positions"),
        ("clip.place.weight", (16, 4), (64, 4), SAME, "resized", "interpolated in 2-D"),
        ("clip.place.weight", (1, 5), (9, 5), SAME, "resized", "interpolated in 2-D"),
        ("clip.place.weight", (16, 4), (8, 4), SAME, "new", "another shape"),
        ("clip.place.weight", (8, 4), (16, 4), SAME, "new", "another shape"),
        ("clip.patch.weight", (4, 3, 4, 4), (4, 3, 8, 8), SAME, "new", "another width"),
    ],
)
def test_each_tensor_has_its_rule(
    name: str,
    stored: tuple[int, ...] | None,
    shape: tuple[int, ...],
    by: Vocabularies,
    how: str,
    rule: str,
) -> None:
    carried = carry({name: shape}, {} if stored is None else {name: stored}, by)[name]
    assert (carried.how, carried.rule) == (how, rule)
    assert (carried.name, carried.stored, carried.shape) == (name, stored, shape)
    assert (carried.change is not None) == (how == "resized")
    if carried.change is not None:
        assert stored is not None
        assert carried.change(torch.ones(stored)).equal(torch.ones(shape))


def test_the_table_names_what_was_resized_new_and_left() -> None:
    """Its columns are aligned."""
    stored = {"embedding.row.weight": (8, 4), "c.x": (2,), "step": NUMBER}
    expected = {"embedding.row.weight": (16, 4), "a": NUMBER, "b.x": (3,), "b.y": (3,)}
    expected |= {"b.z": (1, 2), "c.x": (2,), "c.y": (2,)}
    assert table(carry(expected, stored, SAME), stored) == [
        "tensor                stored     here    how",
        "embedding.row.weight  8 x 4      16 x 4  resized: interpolated linearly",
        "a                     -          1       new: not stored",
        "b.*                   3 tensors          new: not stored",
        "c.y                   -          2       new: not stored",
        "step                  1          -       left: this model has none",
    ]
    assert table(carry({"a": (2,)}, {"a": (2,)}, SAME), {"a": (2,)}) == []


def test_ranges_of_a_safetensors_file_equal_the_library_s(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "s": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    files = TensorFiles(FolderStore(tmp_path), ["model.safetensors"])
    assert files.shapes == {"a": (5, 3), "b": (7,), "s": ()}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        flat = tensor.float().reshape(-1)
        for start, stop in ((0, flat.numel()), (0, 0), (flat.numel() // 2, flat.numel())):
            assert torch.equal(files.flat(name, start, stop), flat[start:stop])


@pytest.mark.parametrize("cut", [4, 30, -4])
def test_a_cut_safetensors_file_is_refused(tmp_path: Path, cut: int) -> None:
    save_file({"a": torch.randn(5, 3)}, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:cut])
    with pytest.raises(CorruptError, match=r"/m\.safetensors .*; copy or write it again"):
        TensorFiles(FolderStore(tmp_path), ["m.safetensors"]).flat("a", 0, 15)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ([], "its header is not a mapping"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "its header lacks 'data_offsets'"),
        ({"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}, "'a' has dtype I8, of F32"),
        (
            {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
            r"'a' has 8 bytes, and its shape \[3\] needs 12",
        ),
    ],
)
def test_a_wrong_header_of_a_safetensors_file_is_told(
    header: Any, reason: str, tmp_path: Path
) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CorruptError, match=rf"/m\.safetensors is not .*: {reason}.*; copy"):
        TensorFiles(FolderStore(tmp_path), ["m.safetensors"])
