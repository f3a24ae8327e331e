"""The verb plan."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from core.config import check
from core.errors import EXIT_FAILED
from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from models.config import LoraConfig
from planning.config import ClusterFlags, DVAEFlags, ModelFlags, ModuleFlags, PlanFlags
from planning.data_jobs import DataFlags, data_json, describe_data
from planning.estimate.hardware import hardware_of
from planning.modules.estimate import estimate_module, mesh_of
from planning.plan import make_plan, write_calibration
from planning.published_report import published_json, show_published
from planning.report import plan_json, show

_USUAL, _JOBS, _MODEL, _DVAE = ClusterFlags(), DataFlags(), ModelFlags(), DVAEFlags()
_MODULE = ModuleFlags()


def plan(arguments: list[str]) -> None:
    """`tapir plan PRESET --world N --gpu NAME`."""

    parse(_given, arguments, "plan")


def _given(
    preset: PositionalText = "",
    world: int = 0,
    gpu: str = "h100",
    batch: int = 0,
    calibration: Path | None = None,
    calibrate: Path | None = None,
    published: bool = False,
    picture: Path | None = None,
    json: bool = False,
    freeze: str = "",
    lora_rank: Annotated[int, tyro.conf.arg(name="lora.rank")] = 0,
    module: Annotated[ModuleFlags, FLAT] = _MODULE,
    cluster: Annotated[ClusterFlags, FLAT] = _USUAL,
    jobs: Annotated[DataFlags, FLAT] = _JOBS,
    model: Annotated[ModelFlags, FLAT] = _MODEL,
    dvae: Annotated[DVAEFlags, FLAT] = _DVAE,
) -> None:
    """Predict whether a model fits on a cluster, its fastest layout, and the training time.

    Needs no GPU: one rank's real layers are built on the meta device and counted. Days and
    cost cover all of the preset's steps. Exit codes: 0 it fits, 1 nothing fits, 2 wrong input.

    Args:
        preset: preset of a prior: tiny, small, paper_2_8b, paper_5_6b, paper_12b; or
            paper_dvae
        world: ranks; by default those of the preset's mesh
        gpu: v100-16gb, v100-32gb, a100-40gb, a100-80gb, h100, h100-500w, or cpu: this machine
        batch: samples a step; by default the preset's
        calibration: a file that --calibrate wrote, in place of the constants of --gpu cpu
        calibrate: measure this machine, which must be idle (some minutes), and write this
            file; takes no preset
        published: show the model's predictions for published runs; takes no preset
        picture: write memory and a step's timeline to FILE.svg, FILE.png or FILE.pdf
        json: print a JSON object on the last line
        freeze: as `tapir train --freeze`: parameters that are not trained
        lora_rank: as `tapir train prior --lora.rank`: rank of a prior's adapters
        module: plan a torch module in place of a preset
        cluster: overrides of the default cluster of these GPUs
        model: options of the prior, as of `tapir train prior`
        dvae: options of the dVAE, as of `tapir train dvae`
        jobs: --data plans pack and tokenize instead: hours, requests, bytes, dollars
    """
    given = {name: value for name, value in locals().items() if name not in ("jobs", "lora_rank")}
    flags = PlanFlags(**given, lora=LoraConfig(rank=lora_rank))
    if jobs.data:
        _plan_jobs(flags, jobs)
    else:
        check(jobs.unused())
        _run(flags)


def _run(flags: PlanFlags) -> None:
    check(flags.problems())
    if flags.calibrate is not None:
        result = write_calibration(flags.calibrate)
    elif flags.published:
        result = published_json()
        show_published(result)
    elif flags.module.estimate:
        _estimate(flags)
        return
    else:
        _plan(flags)
        return
    if flags.json:
        print_json(result)


def _estimate(flags: PlanFlags) -> None:
    hardware = flags.cluster.applied(hardware_of(flags.gpu))
    mesh = mesh_of(flags.module.mesh, flags.world)
    check([*hardware.problems(), *mesh.problems()])
    half = hardware.half_flops > hardware.full_flops and not hardware.cores
    made = estimate_module(flags.module.estimate, mesh, hardware, half)
    LOG.info("%s", made.text(hardware))
    if flags.json:
        print_json({"fits": made.fits(hardware), "gpu": hardware.name, **made.json()})
    if not made.fits(hardware):
        sys.exit(EXIT_FAILED)


def _plan_jobs(flags: PlanFlags, jobs: DataFlags) -> None:
    others = replace(flags, json=False)
    check([] if others == PlanFlags() else ["--data plans data jobs; leave the model's flags out"])
    LOG.info("%s", describe_data(jobs))
    if flags.json:
        print_json(data_json(jobs))


def _plan(flags: PlanFlags) -> None:
    made = make_plan(flags)
    shown = (made.result, made.parameters, made.trained, made.hardware, made.torch)
    show(*shown)
    if flags.json:
        print_json(plan_json(*shown))
    if not made.result.timed:
        sys.exit(EXIT_FAILED)
