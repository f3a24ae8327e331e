"""Which layouts reduce something between nodes, and which could compress it, by hand."""

import pytest

from parallel.compress.between import between_problems

LAYOUT, SHARDED, ALONE = "mesh.nodes=2 is the paper's layout", "weights sharded", "mesh.data=1 no"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_two_nodes_need_sharded_weights_and_whole_layers(
    whole: bool, shards: bool, compress: bool
) -> None:
    problems = between_problems(2, 4, whole, shards, compress)
    assert [text[: len(LAYOUT)] for text in problems] == [LAYOUT] * (not (shards and whole))


@pytest.mark.parametrize(
    ("data", "shards", "compress", "expected"),
    [
        (1, False, False, ""),
        (1, True, False, ""),
        (2, False, False, ""),
        (2, True, False, ""),
        (1, False, True, ALONE),
        (1, True, True, SHARDED),
        (2, False, True, ""),
        (2, True, True, SHARDED),
    ],
)
def test_one_node_compresses_between_whole_replicas(
    data: int, shards: bool, compress: bool, expected: str
) -> None:
    for whole in (False, True):
        problems = between_problems(1, data, whole, shards, compress)
        assert len(problems) == bool(expected) and all(expected in text for text in problems)
