"""Plans of runs that train a part of a prior: adapters, or what an expression leaves."""

import json
from dataclasses import replace

import pytest

from checkpoint.config import CheckpointConfig
from core.errors import ConfigError
from core.flags import parse_over
from models.config import DVAEConfig, LoraConfig
from parallel.config import CompressConfig, EngineConfig, MeshConfig
from parallel.mesh import RankCoordinates
from planning.checkpoint_size import checkpoint_bytes
from planning.config import DVAEFlags, ModelFlags, PlanFlags, settings_of
from planning.dvae import dvae_parameters, dvae_trained, search_dvae
from planning.estimate.hardware import hardware_of
from planning.estimate.layer_work import backward_work, forward_work
from planning.estimate.layers import Held, Marks, count_parameters, count_trained
from planning.estimate.memory import loads_of, marks_of, rank_bytes
from planning.estimate.search import Candidate, variants_of, weigh
from planning.estimate.tallies.tensor import branches_with_gradients
from planning.plan import planned_settings
from planning.report import flags_of
from tests.harness import tapir
from training.config import DVAETrain, LoopConfig
from training.presets import PRESETS

PAPER = settings_of("paper_12b")
LORA = settings_of("paper_12b", lora=LoraConfig(rank=8))
TINY = replace(settings_of("tiny"), mesh=MeshConfig(), engine=EngineConfig())


def test_adapters_of_the_12b_prior_are_under_half_a_percent() -> None:
    """Four matrices of 3968 x 3968 and two of 3968 x 15872 in each of 64 blocks, at rank 8."""
    adapters = 64 * 8 * (4 * (3968 + 3968) + 2 * (3968 + 15872))
    assert count_trained(LORA) == adapters == 36_569_088
    assert adapters / count_parameters(LORA.model) < 0.005
    assert count_trained(PAPER) == count_parameters(PAPER.model) == 12_292_587_008
    assert checkpoint_bytes(LORA)["masters"] == 4 * adapters
    assert checkpoint_bytes(LORA)["moments"] == 8 * adapters


def test_frozen_weights_have_no_moments_and_are_stored() -> None:
    frozen = settings_of("tiny", freeze=r"^embedding|^block00[0-2]\.")
    plain, parts = checkpoint_bytes(settings_of("tiny")), checkpoint_bytes(frozen)
    assert parts["masters"] == plain["masters"]
    assert parts["moments"] == 8 * count_trained(frozen) < plain["moments"]
    one = replace(TINY, freeze=frozen.freeze)
    whole, part = (rank_bytes(loads_of(s, RankCoordinates())) for s in (TINY, one))
    assert part["parameters"] == whole["parameters"]
    assert part["gradients"] == 4 * count_trained(one) < whole["gradients"]
    assert part["optimizer"] == 2 * part["gradients"]
    assert part["activations"] < 0.6 * whole["activations"], "three blocks of four save nothing"


def test_a_plan_of_adapters_is_of_no_base_and_without_compression() -> None:
    assert LORA.init and not LORA.compress.on and LORA.problems() == []
    assert all(not layout.compress.on for layout in variants_of(LORA))
    plain = replace(PAPER, compress=CompressConfig())
    assert any(layout.compress.on for layout in variants_of(plain))


def test_a_stage_without_adapters_is_no_layout() -> None:
    """Tiny's four blocks, embedding and head on six ranks: each has one."""
    tiny = replace(settings_of("tiny", lora=LoraConfig(rank=2)), checkpoint=CheckpointConfig())
    model = replace(tiny.model, layers=6)
    mesh, engine = MeshConfig(pipeline=6), EngineConfig(name="deepspeed_pipe")
    six = replace(tiny, model=model, mesh=mesh, engine=engine)
    whole = replace(six, lora=LoraConfig(), freeze="head|block005")
    hardware = hardware_of("cpu", None)
    assert "stage 5 of 6" in weigh(whole, 6, hardware).why
    assert weigh(six, 6, hardware).why == ""


def test_inputs_have_gradients_after_the_first_trained_parameter() -> None:
    frozen = replace(TINY, freeze=r"embedding|block000|block001\.(attention_norm|[qkvou])")
    loads = loads_of(frozen, RankCoordinates())
    marks = {part.name: (part, each) for part, each in marks_of(loads)}
    inputs = {name: each.input_too for name, (_, each) in marks.items()}
    assert [name for name, none in inputs.items() if none] == ["block000", "block001"]
    counts = {n: branches_with_gradients(*marks[n]) for n in inputs if n.startswith("block")}
    assert [count for count, _, _ in counts.values()] == [0, 1, 2, 2]
    assert [(own, reads) for _, own, reads in counts.values()] == [(0, 0), (1, 0), (2, 2), (2, 2)]
    part = marks["block000"][0]
    one = replace(part, parameters={"q.lora_a": _held()} | part.parameters)
    assert branches_with_gradients(one, Marks(input_too=True)) == (1, 2, 1)
    norm = replace(part, parameters={"attention_norm.weight": _held()})
    assert branches_with_gradients(norm, Marks(input_too=True)) == (2, 2, 0)
    down = replace(part, parameters={"down.weight": _held()})
    assert branches_with_gradients(down, Marks(input_too=True)) == (0, 1, 0)


def _held() -> Held:
    loads = loads_of(TINY, RankCoordinates())
    return next(iter(loads.held.values()))


def test_frozen_weights_have_no_matmul_of_their_gradient() -> None:
    hardware = hardware_of("h100", None)
    flops = {}
    for name, settings in {
        "whole": TINY,
        "frozen": replace(TINY, freeze="."),
        "lora": replace(TINY, lora=LoraConfig(rank=2), init="base"),
    }.items():
        loads = loads_of(settings, RankCoordinates())
        part = loads.layers[1]
        there, back = forward_work(loads, part, hardware), backward_work(loads, part, hardware)
        flops[name] = sum(k.flops for k in there), sum(k.flops for k in back)
        attention = 2.5 * sum(k.flops for k in there if k.rows and k.moved)
    dim, rows = TINY.model.dim, loads_of(TINY, RankCoordinates()).micro * TINY.model.length
    low = 2 * 2 * (8 + 10) * dim * rows
    of_states = flops["frozen"][1] - attention
    assert flops["whole"][1] - flops["frozen"][1] == of_states > 0
    assert flops["lora"][0] - flops["whole"][0] == low
    assert flops["lora"][1] - flops["frozen"][1] == 2 * low


@pytest.mark.parametrize("mlp", ["gelu", "gated"])
def test_every_matmul_has_two_gradients(mlp: str) -> None:
    """Those that run several times too: queries, keys and values, and the gated MLP's two."""
    settings = replace(TINY, model=replace(TINY.model, mlp=mlp))
    loads, hardware = loads_of(settings, RankCoordinates()), hardware_of("h100")
    part = loads.layers[1]
    weights = sum(h.numel for h in part.parameters.values() if h.matrix)
    there, back = (work(loads, part, hardware) for work in (forward_work, backward_work))
    states = 2 * loads.micro * settings.model.length * weights
    assert sum(k.flops for k in there if not k.moved) == states
    assert sum(k.flops for k in back if not k.moved) == 2 * states


def test_adapters_as_wide_as_the_model_are_still_told_from_its_matrices() -> None:
    lora = LoraConfig(rank=TINY.model.dim)
    loads = loads_of(replace(TINY, lora=lora, init="base"), RankCoordinates())
    part, hardware = loads.layers[1], hardware_of("h100")
    there, back = (work(loads, part, hardware) for work in (forward_work, backward_work))
    own, low = (
        2 * loads.micro * TINY.model.length * sum(h.numel for h in held)
        for held in (
            [h for h in part.parameters.values() if h.matrix and not h.trained],
            [h for h in part.parameters.values() if h.trained],
        )
    )
    assert sum(k.flops for k in there if not k.moved) == own + low
    assert sum(k.flops for k in back if not k.moved) == own + 2 * low


def test_the_command_line_says_what_is_trained() -> None:
    text = tapir("plan", "tiny", "--world=1", "--gpu=cpu", "--lora.rank=4", "--json")
    body = json.loads(text.splitlines()[-1])
    assert body["trained_bytes"] == 4 * body["trained_parameters"]
    assert body["trained_parameters"] == 4 * 4 * 18 * 192 < body["parameters"]
    assert "--lora.rank=4" in body["best"]["flags"] and "trained: 55,296 of" in text


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("prior", PlanFlags(preset="tiny", batch=128, freeze="embedding")),
        ("prior", PlanFlags(preset="tiny", model=ModelFlags(norm="rms", tied=True, columns=7))),
        ("dvae", PlanFlags(preset="paper_dvae", dvae=DVAEFlags(codebook=64, levels=(8, 8)))),
        (
            "dvae",
            PlanFlags(
                preset="paper_dvae",
                dvae=DVAEFlags(
                    quantizer="fsq", codebook=64, levels=(8, 8), discriminator_weight=0.5
                ),
            ),
        ),
        ("dvae", PlanFlags(preset="paper_dvae", dvae=DVAEFlags(quantizer="vq", vector=16))),
    ],
)
def test_flags_of_a_plan_give_its_settings_on_any_preset(stage: str, flags: PlanFlags) -> None:
    settings = planned_settings(flags)
    arguments = flags_of(Candidate(settings=settings, bytes_={}, why=""))
    names = ["norm", "qk_norm", "positions", "mlp", "tied", "columns"]
    if stage == "dvae":
        kind = settings.model.quantizer
        names = ["quantizer", "codebook", *{"vq": ["vector"], "fsq": ["levels"]}.get(kind, [])]
    for preset in PRESETS[stage].values():
        trained = parse_over(preset(), arguments, "train")
        assert trained.engine == replace(
            settings.engine,
            matmul_precision=trained.engine.matmul_precision,
            deterministic=trained.engine.deterministic,
        )
        assert trained.mesh == settings.mesh and trained.freeze == settings.freeze
        assert trained.loop.global_batch_size == settings.loop.global_batch_size
        assert all(getattr(trained.model, n) == getattr(settings.model, n) for n in names)
        if stage == "dvae":
            assert trained.discriminator.weight == settings.discriminator.weight
            assert trained.perceptual.weight == settings.perceptual.weight


def test_switches_need_no_value() -> None:
    text = tapir("plan", "tiny", "--world=1", "--gpu=cpu", "--tied", "--qk-norm", "--json")
    model = replace(TINY.model, tied=True, qk_norm=True)
    assert json.loads(text.splitlines()[-1])["parameters"] == count_parameters(model)
    assert count_parameters(model) < count_parameters(TINY.model)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (PlanFlags(preset="tiny", freeze="a("), "not a regular expression"),
        (PlanFlags(preset="paper_dvae", lora=LoraConfig(rank=2)), "is of a prior"),
        (PlanFlags(preset="tiny", lora=LoraConfig(rank=-2)), "must not be negative"),
        (PlanFlags(published=True, freeze="a"), "no use for freeze"),
    ],
)
def test_wrong_flags_are_named(flags: PlanFlags, text: str) -> None:
    assert any(text in problem for problem in flags.problems())


def test_an_expression_that_freezes_nothing_is_refused() -> None:
    """Names of adapters count, as in training."""
    with pytest.raises(ConfigError, match=r"freeze='zzz' is found in no parameter's name"):
        planned_settings(PlanFlags(preset="tiny", freeze="zzz"))
    with pytest.raises(ConfigError, match="found in no parameter's name"):
        planned_settings(PlanFlags(preset="tiny", freeze="lora_a"))
    with pytest.raises(ConfigError, match="found in no parameter's name; there are dvae"):
        planned_settings(PlanFlags(preset="paper_dvae", freeze="zzz"))
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        planned_settings(PlanFlags(preset="paper_dvae", freeze="."))
    adapted = PlanFlags(preset="tiny", freeze="block000.*lora_a", lora=LoraConfig(rank=2))
    assert planned_settings(adapted).freeze == "block000.*lora_a"


def test_a_frozen_encoder_of_a_dvae_has_no_gradients_and_is_run_forward_alone() -> None:
    plain = DVAETrain(
        model=DVAEConfig(pixels=32, width=4, code_width=8),
        loop=LoopConfig(global_batch_size=16),
        mesh=MeshConfig(),
        engine=EngineConfig(),
    )
    frozen = replace(plain, freeze=r"^dvae\.dvae\.encoder")
    whole, part = (search_dvae(s, 1, hardware_of("h100")).timed[0] for s in (plain, frozen))
    assert dvae_trained(plain) == dvae_parameters(plain.model) > dvae_trained(frozen) > 0
    assert part.candidate.bytes_["parameters"] == whole.candidate.bytes_["parameters"]
    assert part.candidate.bytes_["gradients"] == 4 * dvae_trained(frozen)
    assert part.candidate.bytes_["activations"] < whole.candidate.bytes_["activations"]
    assert part.estimate.parts["compute"] < whole.estimate.parts["compute"]
