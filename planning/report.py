"""A plan as JSON and as tables on the terminal."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from core.known_flags import flag_text
from core.memory import memory_unit, size_text
from planning.checkpoint_size import checkpoint_bytes
from planning.config import ModelFlags
from planning.estimate.hardware import Hardware
from planning.estimate.memory import CATEGORIES
from planning.estimate.overlapped.search import TorchRow
from planning.estimate.reserve import NCCL, PROCESS
from planning.estimate.search import Candidate, SearchResult, Timed, beside, layout_name
from planning.estimate.zero_layout import stage_of_zero
from planning.start_up.model import SHARDS, start_costs
from planning.tails import Tails, tails
from planning.torch_report import show_torch, torch_json
from training.config import DVAETrain, PriorTrain

SHOWN = 8
"""Rows of a table on the terminal; --json has all."""
WIDTH = 142
"""Columns that the tables need, also if output is not a terminal."""


def plan_json(
    result: SearchResult,
    parameters: int,
    trained: int,
    hardware: Hardware,
    torch: list[TorchRow],
) -> dict[str, Any]:
    """The whole plan."""
    rows = [timed_json(row) for row in result.timed]
    rest = tails_of(result, hardware)
    return {
        "fits": bool(rows),
        "parameters": parameters,
        "trained_parameters": trained,
        "trained_bytes": 4 * trained,
        "gpu": hardware.name,
        "usable_bytes": int(hardware.usable),
        "context_bytes": int(hardware.context),
        "host_memory_bytes": int(hardware.host_memory),
        "best": rows[0] if rows else None,
        "alternatives": rows[1:],
        "rejected": [rejected_json(row, parameters) for row in result.rejected],
        **({"torch": torch_json(torch)} if torch else {}),
        **({"beside_steps": rest.json()} if rest else {}),
    }


def tails_of(result: SearchResult, hardware: Hardware) -> Tails | None:
    """What a prior's run does beside its steps, with the first candidate that fits."""
    if not result.timed:
        return None
    candidate, estimate = result.timed[0].candidate, result.timed[0].estimate
    stored = checkpoint_json(candidate)
    if not isinstance(candidate.settings, PriorTrain) or not stored:
        return None
    return tails(candidate.settings, estimate.seconds, stored["total"], hardware)


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """Settings and bytes of a candidate."""
    settings = candidate.settings
    mesh, engine = settings.mesh, settings.engine
    micro = (
        settings.loop.global_batch_size // mesh.data // engine.gradient_accumulation_steps
        if candidate.bytes_
        else 0
    )
    return {
        "layout": layout_name(settings),
        "mesh": dict(vars(mesh)),
        "engine": engine.name,
        "zero_stage": engine.zero_stage if engine.name != "reference" else 0,
        "precision": engine.precision,
        "micro_batch": micro,
        "gradient_accumulation_steps": engine.gradient_accumulation_steps,
        "recompute": engine.recompute,
        "recompute_granularity": engine.recompute_granularity,
        "compress_rank": settings.compress.rank,
        "compress_payload": settings.compress.payload,
        "moments": settings.optim.moments,
        "bytes": candidate.bytes_,
        "total_bytes": candidate.total,
        "start_up": start_json(candidate),
        "checkpoint": checkpoint_json(candidate),
        "flags": flags_of(candidate),
    }


def start_json(candidate: Candidate) -> dict[str, Any]:
    """Peaks before the first step, in bytes; CPU seconds and requests until the engine is built."""
    start, costs = candidate.start, start_costs(candidate.settings.mesh)
    body = {
        "seconds": costs.total,
        "seconds_of": costs.seconds,
        "shards": SHARDS,
        "requests": {
            "store": costs.store_requests,
            "store_a_rank": costs.store_requests_a_rank,
            "data": costs.data_requests,
        },
        "ranks_that_read_data": costs.data_readers,
    }
    if start is None:
        return body
    return body | {
        "host_a_rank": PROCESS + start.own,
        "loader": start.loader,
        "host_a_node": start.node,
        "ranks_a_node": start.ranks,
        "device": start.device,
    }


def checkpoint_json(candidate: Candidate) -> dict[str, int]:
    """Bytes of a prior's checkpoint by part, and of all parts; empty for impossible settings."""
    settings = candidate.settings
    if not (candidate.bytes_ and isinstance(settings, PriorTrain)):
        return {}
    parts = checkpoint_bytes(settings)
    return {**parts, "total": sum(parts.values())}


def flags_of(candidate: Candidate) -> list[str]:
    """Flags of `tapir train prior PRESET`, or of a dVAE, for a candidate."""
    settings = candidate.settings
    mesh, engine = settings.mesh, settings.engine
    flags = _given("mesh", mesh, vars(mesh))
    flags += [f"--engine.name={engine.name}", f"--engine.zero-stage={engine.zero_stage}"]
    flags += [
        f"--engine.gradient-accumulation-steps={engine.gradient_accumulation_steps}",
        f"--engine.precision={engine.precision}",
    ]
    flags += _given("engine", engine, ("recompute", "recompute_granularity", "reduce_bucket_size"))
    flags += [f"--loop.global-batch-size={settings.loop.global_batch_size}", *_options(settings)]
    flags += [f"--freeze={settings.freeze}"] if settings.freeze else []
    if isinstance(settings, PriorTrain) and settings.lora.rank:
        flags += [f"--lora.rank={settings.lora.rank}", f"--lora.alpha={settings.lora.alpha:g}"]
    return [*flags, *_given("compress", settings.compress, ("rank", "payload"))]


def _options(settings: PriorTrain | DVAETrain) -> list[str]:
    """The model's options that `plan` has too, as flags that give them on any preset."""
    if isinstance(settings, DVAETrain):
        flags = [f"--perceptual.weight={settings.perceptual.weight:g}"]
        flags += [f"--discriminator.weight={settings.discriminator.weight:g}"]
        names_by = {"gumbel": (), "vq": ("init", "vector"), "fsq": ("init", "levels")}
        names = names_by[settings.model.quantizer]
        return [*flags, *_given("model", settings.model, ("quantizer", "codebook", *names))]
    return _given("model", settings.model, [each.name for each in fields(ModelFlags)])


def _given(part: str, config: Any, names: Iterable[str]) -> list[str]:
    """Flags of some fields of one part of the settings."""
    flags = []
    for name in names:
        value, flag = getattr(config, name), f"{part}.{name}"
        if isinstance(value, bool):
            flags.append(flag_text(flag, negated=not value))
        elif isinstance(value, tuple):
            flags += [flag_text(flag), *map(str, value)]
        else:
            flags.append(f"{flag_text(flag)}={value}")
    return flags


def timed_json(row: Timed) -> dict[str, Any]:
    """A candidate that fits, with its predicted step."""
    estimate = row.estimate
    return {
        **candidate_json(row.candidate),
        "step_seconds": estimate.seconds,
        "mfu": estimate.mfu,
        "bubble": estimate.bubble,
        "exposed_communication_seconds": estimate.exposed,
        "tokens_per_second": estimate.tokens_per_second,
        "days": estimate.days,
        "cost_dollars": estimate.cost,
        "seconds": estimate.parts,
        **({"pictures": estimate.decoding.json()} if estimate.decoding else {}),
        "traffic": estimate.traffic,
    }


def rejected_json(row: Candidate, parameters: int) -> dict[str, Any]:
    """A candidate that cannot run, and why."""
    published = beside(row, parameters)
    return {
        **candidate_json(row),
        "why": row.why,
        **({"published": published} if published else {}),
    }


def show(
    result: SearchResult,
    parameters: int,
    trained: int,
    hardware: Hardware,
    torch: list[TorchRow],
) -> None:
    """Print the plan as tables."""
    console = _console()
    if trained < parameters:
        share = trained / parameters
        console.print(
            f"trained: {trained:,} of {parameters:,} parameters ({share:.2%}), "
            f"{size_text(4 * trained)} of weights"
        )
    if result.timed:
        console.print(_fitting(result, parameters, hardware), _spent(result.timed[0]))
        if parts := checkpoint_json(result.timed[0].candidate):
            console.print(_stored(parts))
        if pictures := result.timed[0].estimate.decoding:
            console.print(pictures.text())
        if rest := tails_of(result, hardware):
            console.print(rest.text())
        console.print(_start(result.timed[0].candidate))
        show_torch(console, torch)
    else:
        console.print(_title(result, parameters, hardware))
    rows = [row for row in _shown(result) if row.bytes_]
    if rows:
        console.print(_bytes_table(rows))
    for row in result.rejected:
        console.print(f"{_mesh(row)} {layout_name(row.settings)}: {row.why}")
        for name, count in beside(row, parameters).items():
            console.print(f"    beside it, {name.replace('_', ' ')}: {size_text(count)} a rank")


def _shown(result: SearchResult) -> list[Candidate]:
    return [row.candidate for row in result.timed[:SHOWN]] + result.rejected


def _title(result: SearchResult, parameters: int, hardware: Hardware) -> str:
    return (
        f"{parameters:,} parameters on {hardware.name}: {len(result.timed)} layouts fit, "
        f"{len(result.rejected)} do not"
    )


def _mesh(candidate: Candidate) -> str:
    mesh = candidate.settings.mesh
    shared = "+SP" if mesh.sequence_parallel else ""
    return f"TP{mesh.tensor}{shared} PP{mesh.pipeline} DP{mesh.data}"


def _short(candidate: Candidate) -> str:
    """A layout's name in a narrow column."""
    settings = candidate.settings
    if settings.mesh.nodes > 1:
        return "paper"
    return settings.engine.name.removeprefix("deepspeed_") + str(stage_of_zero(settings) or "")


def _console() -> Console:
    console = Console()
    console.width = max(console.width, WIDTH)
    return console


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _fitting(result: SearchResult, parameters: int, hardware: Hardware) -> Table:
    size, unit = memory_unit(max(row.candidate.total for row in result.timed[:SHOWN]))
    columns = ("mesh", "layout", "micro", "recompute", "rank", unit, "step s", "MFU", "bubble")
    table = _table(_title(result, parameters, hardware), *columns, "days", "cost $")
    for row in result.timed[:SHOWN]:
        body, estimate = candidate_json(row.candidate), row.estimate
        table.add_row(
            _mesh(row.candidate),
            _short(row.candidate),
            f"{body['micro_batch']} x {body['gradient_accumulation_steps']}",
            body["recompute_granularity"] if body["recompute"] else "no",
            str(body["compress_rank"]),
            f"{row.candidate.total / size:.1f}",
            f"{estimate.seconds:.3g}",
            f"{estimate.mfu:.1%}",
            f"{estimate.bubble:.0%}",
            f"{estimate.days:.1f}",
            f"{estimate.cost:,.0f}" if estimate.cost else "",
        )
    return table


def _spent(row: Timed) -> Table:
    shown = {name: value for name, value in row.estimate.parts.items() if value}
    table = _table("a step of the first one, seconds", *shown)
    table.add_row(*(f"{value:.3g}" for value in shown.values()))
    return table


def _stored(parts: dict[str, int]) -> str:
    total = size_text(parts.pop("total"))
    shares = ", ".join(f"{name} {size_text(count)}" for name, count in parts.items() if count)
    return f"a checkpoint of the first one takes {total}: {shares}"


def _start(candidate: Candidate) -> str:
    costs = start_costs(candidate.settings.mesh)
    parts = ", ".join(f"{name} {value:.2g}" for name, value in costs.seconds.items() if value)
    return (
        f"its start: {costs.total:.3g} CPU seconds of an EPYC core before the engine is built "
        f"({parts}; {SHARDS:,} shards); {costs.store_requests:,} requests to the ranks' store, "
        f"{costs.data_requests} for manifests and indexes\n"
    )


def _bytes_table(rows: list[Candidate]) -> Table:
    size, unit = memory_unit(max(row.total for row in rows))
    names = (*CATEGORIES, NCCL)
    title, columns = f"{unit} of the fullest rank", [*names, "all"]
    if rows[0].start:
        title, columns = f"{title}, and of a node's host while its ranks start", [*columns, "host"]
    table = _table(title, "mesh", "layout", *columns)
    for row in rows:
        cells = [f"{row.bytes_[name] / size:.2f}" for name in names]
        cells += [f"{row.total / size:.1f}"]
        cells += [f"{row.start.node / size:.0f}"] if row.start else []
        table.add_row(_mesh(row), _short(row), *cells)
    return table
