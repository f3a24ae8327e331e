"""The rules by which weights are carried over from one model to another."""

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


def test_patches_are_interpolated_in_two_dimensions() -> None:
    line = torch.tensor([0.0, 4.0])
    stored = torch.stack([(10 * line[:, None] + line[None]).flatten()], dim=1)
    wide = torch.tensor([0.0, 1.0, 3.0, 4.0])
    expected = (10 * wide[:, None] + wide[None]).flatten()
    assert torch.allclose(interpolate_grid(stored, 16)[:, 0], expected)
    assert torch.equal(interpolate_grid(stored, 4), stored)


def test_longer_texts_repeat_the_last_position() -> None:
    assert extend_rows(column(1, 2, 3), 2).T.tolist() == [[1, 2]]
    assert extend_rows(column(1, 2, 3), 5).T.tolist() == [[1, 2, 3, 3, 3]]


@pytest.mark.parametrize(
    ("name", "stored", "shape", "by", "how"),
    [
        ("block000.q.weight", (4, 4), (4, 4), SAME, "taken"),
        ("block000.q.weight", (4, 4), (8, 4), SAME, "new"),
        ("block000.q.weight", None, (4, 4), SAME, "new"),
        ("embedding.text.table.weight", (9, 4), (9, 4), SAME, "taken"),
        (
            "embedding.text.table.weight",
            (9, 4),
            (2, 4),
            Vocabularies(pieces=[[1], [0, 3]]),
            "resized",
        ),
        ("embedding.text.table.weight", (9, 3), (2, 4), Vocabularies(pieces=[[1], [0, 3]]), "new"),
        ("head.text.bias", (9,), (2,), Vocabularies(pieces=[[1], [0, 3]]), "resized"),
        ("clip.words.weight", (9, 4), (2, 4), Vocabularies(pieces=[[1], [0, 3]]), "resized"),
        ("embedding.image.table.weight", (9, 4), (9, 4), SAME, "taken"),
        ("embedding.image.table.weight", (9, 4), (9, 4), Vocabularies(same_codes=False), "new"),
        ("head.image.bias", (9,), (9,), Vocabularies(same_codes=False), "new"),
        ("embedding.row.weight", (8, 4), (16, 4), SAME, "resized"),
        ("embedding.column.weight", (8, 4), (4, 4), SAME, "resized"),
        ("embedding.text_position.weight", (8, 4), (16, 4), SAME, "resized"),
        ("embedding.pad.weight", (8, 4), (4, 4), SAME, "resized"),
        ("clip.word_place.weight", (8, 4), (4, 4), SAME, "resized"),
        ("clip.place.weight", (16, 4), (64, 4), SAME, "resized"),
        ("clip.place.weight", (16, 4), (8, 4), SAME, "new"),
        ("clip.patch.weight", (4, 3, 4, 4), (4, 3, 8, 8), SAME, "new"),
    ],
)
def test_each_tensor_has_its_rule(
    name: str,
    stored: tuple[int, ...] | None,
    shape: tuple[int, ...],
    by: Vocabularies,
    how: str,
) -> None:
    carried = carry({name: shape}, {} if stored is None else {name: stored}, by)[name]
    assert carried.how == how
    assert (carried.change is not None) == (how == "resized")
    if carried.change is not None:
        assert stored is not None and carried.change(torch.ones(stored)).shape == shape


def test_the_table_names_what_was_resized_new_and_left() -> None:
    stored = {"a.weight": (2, 2), "embedding.row.weight": (8, 4), "old.bias": (3,)}
    expected = {"a.weight": (2, 2), "embedding.row.weight": (16, 4), "lora.weight": (2, 2)}
    lines = table(carry(expected, stored, SAME), stored)
    assert [" ".join(line.split()) for line in lines[:3]] == [
        "tensor stored here how",
        "embedding.row.weight 8 x 4 16 x 4 resized: interpolated linearly",
        "lora.weight - 2 x 2 new: not stored",
    ]
    assert lines[3].startswith("old.bias") and lines[3].endswith("left: this model has none")
    assert table(carry({"a": (2,)}, {"a": (2,)}, SAME), {"a": (2,)}) == []
    layer = {"b.x": (2,), "b.y": (3, 3), "c.x": (2,), "c.y": (2,)}
    lines = table(carry(layer, {"c.x": (2,)}, SAME), {"c.x": (2,)})
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "b.* 2 tensors new: not stored",
        "c.y - 2 new: not stored",
    ]


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
