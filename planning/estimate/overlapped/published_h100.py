"""Published bf16 training runs on H100s, as their authors describe them; imports no torch.

Sources, read on 2026-11-30:

- pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3, and
  benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md with its picture (commit 5ecb74e5): FSDP2,
  fp32 reduce-scatters, sequence parallelism with TP; their card has HBM2e of 2.4 TB/s and a limit
  of 500 W. Selective recompute repeats every second matmul, and all that is no matmul or attention.
- allenai/OLMo-core, README.md of commit 7e58d128: two digits; batches and sharding are those of
  src/scripts/train/OLMo2-*.py and Llama3-8B.py, whose default is a node of 8 GPUs.
- mosaicml/llm-foundry, scripts/train/benchmarking/README.md (commit 8c8dd48f): all rows of the two
  H100 BF16 tables; eager FSDP, bf16 weights, fp32 reduce-scatters. Attention: `sweep.py` for 128
  GPUs and more, else the default of `submit_benchmarks.py` at the time, Triton's.

FP8 rows are left out. Every second row in the order of this file is held out: it is compared with
the model and never looked at to make it.
"""

from dataclasses import dataclass, replace

from planning.estimate.overlapped.step import Sizes, Step


@dataclass(frozen=True, kw_only=True)
class Run(Step):
    """A published run, and how its step was run."""

    source: str
    name: str
    gpu: str
    """Key of planning/estimate/hardware.py."""
    measured: float
    """Tokens a second and GPU."""
    held_out: bool = False


_LLAMA_8B = Sizes(
    hidden=4096, heads=32, layers=32, groups=8, wide=14336, vocabulary=128_256, gated=True
)
_LLAMA_70B = Sizes(
    hidden=8192, heads=64, layers=80, groups=8, wide=28672, vocabulary=128_256, gated=True
)


def _olmo(hidden: int, heads: int, layers: int, wide: int) -> Sizes:
    return Sizes(
        hidden=hidden,
        heads=heads,
        layers=layers,
        groups=heads,
        wide=wide,
        vocabulary=100_352,
        gated=True,
        qk_norm=True,
    )


def _gpt(hidden: int, heads: int, layers: int) -> Sizes:
    return Sizes(
        hidden=hidden,
        heads=heads,
        layers=layers,
        groups=heads,
        wide=4 * hidden,
        vocabulary=50_368,
    )


_MPT = {
    "760m": _gpt(1536, 12, 24),
    "1b": _gpt(2048, 16, 24),
    "3b": _gpt(2560, 20, 32),
    "7b": _gpt(4096, 32, 32),
    "13b": _gpt(5120, 40, 40),
    "30b": _gpt(7168, 56, 48),
    "70b": _gpt(8192, 64, 80),
}


def _titan(gpus: int, measured: float, *, compiled: bool) -> Run:
    return Run(
        source="torchtitan",
        name=f"Llama 8B, {gpus} GPUs, {'compiled' if compiled else 'eager'}",
        gpu="h100-500w",
        sizes=_LLAMA_8B,
        length=8192,
        gpus=gpus,
        micro=2,
        accumulate=1,
        recompute="selective",
        compiled=compiled,
        measured=measured,
    )


def _tensor(gpus: int, micro: int, measured: float, *, asynchronous: bool) -> Run:
    large = gpus == 256
    return Run(
        source="torchtitan",
        name=f"Llama {'70B' if large else '8B'}, TP8, {'async' if asynchronous else 'blocking'}",
        gpu="h100-500w",
        sizes=_LLAMA_70B if large else _LLAMA_8B,
        length=8192,
        gpus=gpus,
        micro=micro,
        accumulate=1,
        tensor=8,
        recompute="full" if large else "selective",
        compiled=True,
        asynchronous=asynchronous,
        measured=measured,
    )


def _ai2(name: str, sizes: Sizes, micro: int, accumulate: int, measured: float) -> Run:
    return Run(
        source="OLMo-core",
        name=name,
        gpu="h100",
        sizes=sizes,
        length=4096,
        gpus=8,
        micro=micro,
        accumulate=accumulate,
        compiled=True,
        measured=measured,
    )


def _mpt(
    model: str,
    length: int,
    gpus: int,
    micro: int,
    accumulate: int,
    measured: float,
    *,
    full: bool,
    stage: int = 3,
    flash: bool = False,
) -> Run:
    return Run(
        source="llm-foundry",
        name=f"MPT {model}, {length}, {gpus} GPUs",
        gpu="h100",
        sizes=_MPT[model],
        length=length,
        gpus=gpus,
        micro=micro,
        accumulate=accumulate,
        stage=stage,
        recompute="full" if full else "none",
        attention="flash" if flash else "triton",
        measured=measured,
    )


_ROWS = (
    _titan(8, 5762, compiled=False),
    _titan(8, 6667, compiled=True),
    _titan(128, 5605, compiled=False),
    _titan(128, 6514, compiled=True),
    _tensor(256, 16, 597.3, asynchronous=False),
    _tensor(256, 16, 652.4, asynchronous=True),
    _tensor(64, 12, 4378, asynchronous=False),
    _tensor(64, 12, 4809.4, asynchronous=True),
    _ai2("OLMo2 1B", _olmo(2048, 16, 18, 5632), 8, 16, 55_000),
    _ai2("OLMo2 7B", _olmo(4096, 32, 32, 11008), 2, 64, 10_000),
    _ai2("Llama 8B", replace(_LLAMA_8B, vocabulary=100_352), 2, 64, 9_500),
    _ai2("OLMo2 13B", _olmo(5120, 40, 40, 13824), 1, 256, 4_600),
    _mpt("70b", 2048, 512, 8, 1, 1007, full=True, stage=3, flash=True),
    _mpt("70b", 2048, 256, 8, 1, 1035, full=True, stage=3, flash=True),
    _mpt("70b", 2048, 128, 8, 1, 1058, full=True, stage=3, flash=True),
    _mpt("30b", 2048, 512, 8, 1, 2115, full=True, stage=3, flash=False),
    _mpt("30b", 2048, 256, 8, 1, 2148, full=True, stage=3, flash=False),
    _mpt("30b", 2048, 128, 8, 1, 2199, full=True, stage=3, flash=False),
    _mpt("13b", 2048, 512, 16, 1, 4952, full=True, stage=3, flash=False),
    _mpt("13b", 2048, 256, 16, 1, 4989, full=True, stage=3, flash=False),
    _mpt("13b", 2048, 128, 16, 1, 5080, full=True, stage=3, flash=False),
    _mpt("7b", 2048, 512, 6, 1, 9670, full=False, stage=3, flash=True),
    _mpt("7b", 2048, 256, 6, 1, 10119, full=False, stage=3, flash=True),
    _mpt("7b", 2048, 128, 6, 1, 10475, full=False, stage=3, flash=True),
    _mpt("3b", 2048, 512, 8, 1, 21664, full=False, stage=2, flash=True),
    _mpt("3b", 2048, 256, 8, 1, 22772, full=False, stage=2, flash=True),
    _mpt("3b", 2048, 128, 8, 1, 23422, full=False, stage=2, flash=True),
    _mpt("1b", 2048, 512, 12, 1, 39837, full=False, stage=2, flash=True),
    _mpt("1b", 2048, 256, 12, 1, 42555, full=False, stage=2, flash=True),
    _mpt("1b", 2048, 128, 12, 1, 44123, full=False, stage=2, flash=True),
    _mpt("70b", 2048, 64, 8, 4, 1039, full=True),
    _mpt("70b", 2048, 32, 2, 16, 882, full=True),
    _mpt("30b", 8192, 8, 1, 21, 1384, full=True),
    _mpt("30b", 4096, 8, 1, 21, 1802, full=True),
    _mpt("30b", 2048, 32, 14, 3, 2308, full=True),
    _mpt("30b", 2048, 16, 10, 3, 2263, full=True),
    _mpt("30b", 2048, 8, 3, 21, 2002, full=True),
    _mpt("30b", 1024, 8, 6, 21, 2084, full=True),
    _mpt("13b", 32768, 8, 1, 3, 1976, full=True),
    _mpt("13b", 16384, 8, 3, 3, 2985, full=True),
    _mpt("13b", 4096, 8, 10, 3, 4717, full=True),
    _mpt("13b", 2048, 64, 2, 1, 4800, full=False),
    _mpt("13b", 2048, 32, 2, 1, 4811, full=False),
    _mpt("13b", 2048, 16, 2, 1, 4767, full=False),
    _mpt("13b", 2048, 8, 2, 1, 4792, full=False),
    _mpt("13b", 1024, 8, 40, 3, 5502, full=True),
    _mpt("7b", 65536, 8, 1, 2, 1956, full=True),
    _mpt("7b", 32768, 8, 2, 2, 3318, full=True),
    _mpt("7b", 8192, 8, 8, 2, 6935, full=True),
    _mpt("7b", 4096, 8, 16, 2, 8611, full=True),
    _mpt("7b", 2048, 8, 6, 1, 10643, full=False),
    _mpt("7b", 1024, 8, 64, 2, 10203, full=True),
    _mpt("3b", 65536, 8, 1, 2, 3262, full=True),
    _mpt("3b", 32768, 8, 3, 6, 5873, full=True),
    _mpt("3b", 16384, 8, 1, 6, 11152, full=False),
    _mpt("3b", 8192, 8, 3, 6, 16578, full=False),
    _mpt("3b", 4096, 8, 5, 6, 20964, full=False),
    _mpt("3b", 2048, 64, 6, 3, 22525, full=False),
    _mpt("3b", 2048, 32, 6, 3, 23021, full=False),
    _mpt("3b", 2048, 16, 10, 3, 24142, full=False),
    _mpt("3b", 1024, 8, 20, 6, 27046, full=False),
    _mpt("3b", 512, 8, 40, 6, 27965, full=False),
    _mpt("1b", 65536, 8, 1, 2, 5506, full=True),
    _mpt("1b", 32768, 8, 1, 4, 12025, full=False),
    _mpt("1b", 16384, 8, 2, 4, 19649, full=False),
    _mpt("1b", 8192, 8, 3, 4, 29157, full=False),
    _mpt("1b", 4096, 8, 7, 4, 38535, full=False),
    _mpt("1b", 2048, 64, 20, 1, 44402, full=False),
    _mpt("1b", 2048, 32, 20, 1, 45130, full=False),
    _mpt("1b", 2048, 16, 20, 1, 46037, full=False),
    _mpt("1b", 2048, 8, 14, 1, 45455, full=False),
    _mpt("1b", 1024, 8, 18, 4, 48910, full=False),
    _mpt("1b", 512, 8, 56, 4, 52275, full=False),
    _mpt("760m", 32768, 8, 1, 2, 16291, full=False),
    _mpt("760m", 16384, 8, 3, 2, 27815, full=False),
    _mpt("760m", 8192, 8, 6, 2, 41825, full=False),
    _mpt("760m", 4096, 8, 12, 2, 55459, full=False),
    _mpt("760m", 2048, 32, 24, 1, 67971, full=False),
    _mpt("760m", 2048, 16, 24, 1, 68551, full=False),
    _mpt("760m", 2048, 8, 24, 2, 63147, full=False),
    _mpt("760m", 1024, 8, 48, 2, 78581, full=False),
    _mpt("760m", 512, 8, 96, 2, 83749, full=False),
)

H100_RUNS = tuple(replace(run, held_out=index % 2 == 1) for index, run in enumerate(_ROWS))
"""All rows; every second one is held out."""
