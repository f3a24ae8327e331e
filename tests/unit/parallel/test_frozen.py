"""Frozen parameters by expression; stages that would have nothing to train are refused."""

from dataclasses import replace

import pytest
import torch

from core.config import expression_problems
from core.errors import ConfigError
from models.adapters import adapted
from models.config import LoraConfig, PriorConfig
from models.prior import prior_program
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.engines.frozen import check_frozen, freeze, stage_problem, trained
from parallel.engines.protocol import EngineSettings, Whole, parameter_groups
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Mesh
from parallel.placement import placement_of

CONFIG = PriorConfig(
    dim=8, heads=2, layers=2, text_length=4, text_vocabulary=20, image_vocabulary=10, grid=2
)
SETTINGS = EngineSettings(
    optim=OptimConfig(lr=0.1), engine=EngineConfig(), compress=CompressConfig(), seed=0
)
BATCH = {
    "text": torch.randint(0, 20, (2, 4), generator=torch.Generator().manual_seed(0)),
    "image": torch.randint(0, 10, (2, 4), generator=torch.Generator().manual_seed(1)),
}


def test_an_expression_matches_anywhere_in_a_global_name() -> None:
    program = freeze(prior_program(CONFIG, 0), r"^block000\.|head\.text")
    names = Whole(program, EngineConfig(), torch.device("cpu")).stage.global_names()
    frozen = names.keys() - trained(names).keys()
    assert frozen == {n for n in names if n.startswith("block000.") or "head.text" in n}
    kept = [p for group in parameter_groups(names, OptimConfig()) for p in group["params"]]
    assert {id(p) for p in kept} == {id(p) for p in trained(names).values()}
    plain = prior_program(CONFIG, 0)
    assert freeze(plain, "") is plain


def test_one_process_changes_and_counts_what_is_trained_alone() -> None:
    engine = ReferenceEngine(freeze(prior_program(CONFIG, 0), "embedding|up"), SETTINGS, Mesh())
    before = {name: p.clone() for name, p in engine._names.items()}
    full = ReferenceEngine(prior_program(CONFIG, 0), SETTINGS, Mesh())
    full.step([BATCH], 0.0)
    kept = [p.grad for n, p in full._names.items() if n not in engine.frozen()]
    squares = [gradient.square().sum() for gradient in kept if gradient is not None]
    norm = float(torch.stack(squares).sum().sqrt())
    result = engine.step([BATCH], 0.1)
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    changed = {n for n, p in engine._names.items() if not torch.equal(p, before[n])}
    assert changed == engine._names.keys() - engine.frozen()
    kinds: dict[str, set[str]] = {}
    for part in engine.state_slices():
        kinds.setdefault(part.name, set()).add(part.kind)
    assert kinds["embedding.start.weight"] == {"master"} and len(kinds["head.text.weight"]) == 4
    bytes_, frozen = engine.memory(), sum(before[n].numel() for n in engine.frozen())
    assert bytes_["parameters"] == full.memory()["parameters"]
    assert bytes_["gradients"] == bytes_["parameters"] - 4 * frozen == bytes_["optimizer"] // 2


def test_what_cannot_be_trained_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    program = prior_program(CONFIG, 0)
    with pytest.raises(ConfigError, match="found in no parameter's name; there are embedding"):
        check_frozen(freeze(program, "blk"), "blk", 1)
    with pytest.raises(ConfigError, match="no parameter to train"):
        check_frozen(freeze(program, "."), ".", 1)
    with pytest.raises(ConfigError, match="stage 0 of 4 of the pipeline has no parameter to train"):
        check_frozen(adapted(program, LoraConfig(rank=1), 0), "", 4)
    with caplog.at_level("INFO", "tapir"):
        check_frozen(adapted(program, LoraConfig(rank=1), 0), "", 1)
        check_frozen(program, "", 1)
    sizes = 2 * (4 * (8 + 8) + 2 * (8 + 32))
    assert [f"{sizes:,} parameters are trained, in 24 tensors" in t for t in caplog.messages] == [
        True
    ]


def test_copies_have_the_name_of_what_they_are_tied_to(caplog: pytest.LogCaptureFixture) -> None:
    """An expression on a copy's own name would freeze nothing; a table counts once."""
    program = prior_program(replace(CONFIG, tied=True), 0)
    with pytest.raises(ConfigError, match="found in no parameter's name"):
        pattern = r"^head\.(text|image)\.weight"
        check_frozen(freeze(program, pattern), pattern, 1)
    names = Whole(program, EngineConfig(), torch.device("cpu")).stage.global_names()
    left = [p for n, p in names.items() if not n.startswith("block000.")]
    with caplog.at_level("INFO", "tapir"):
        check_frozen(freeze(program, "^block000"), "^block000", 1)
    sizes = sum(placement_of(p).numel for p in left)
    assert f"{sizes:,} parameters are trained, in {len(left)} tensors" in caplog.messages[-1]


def test_stages_are_cut_by_cost() -> None:
    assert stage_problem([True, False, True], [1, 1, 1], 2) == ""
    assert "stage 1 of 3" in stage_problem([True, False, True], [1, 1, 1], 3)
    assert stage_problem([False, True, False, True], [1, 1, 5, 1], 2) == ""


def test_expressions_are_checked() -> None:
    assert expression_problems("a(b", "freeze")[0].startswith("freeze='a(b' is not a regular")
    assert expression_problems("a|b", "freeze") == expression_problems("", "freeze") == []


def test_a_trained_copy_is_compressed_alone() -> None:
    """Frozen matrices are no candidates of compression."""
    engine = ReferenceEngine(
        freeze(prior_program(CONFIG, 0), "up|down|q"),
        replace(SETTINGS, compress=CompressConfig(rank=2)),
        Mesh(),
    )
    assert engine._compressor is not None
    names = {name for name, _ in engine._compressor._powersgd.errors().items()}
    assert names == {f"block00{i}.{n}.weight" for i in range(2) for n in ("k", "v", "out")}
