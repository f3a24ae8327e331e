"""The front door: `tapir VERB`. Verbs are imported only when they are called."""

import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
PACKAGES = (
    *("core", "cluster", "checkpoint", "parallel", "models"),
    *("data_pipeline", "training", "planning", "generation", "serving", "workflow", "cli"),
)
"""Our packages in HOME; a user's own files may have the same names."""
SPINS = "10000"
"""Busy-wait iterations of a libgomp thread at a barrier before it sleeps. libgomp's default keeps
spinning for milliseconds, which stalls decoding when other processes use the cores: docs/LOG.md."""
VERBS = {
    "demo": ("cli.sample:demo", "all stages on this machine; ends with report.html"),
    "pack": ("cli.data:pack", "raw pairs -> shards in a store, split by key"),
    "data": ("cli.catalogue:data", "what a packed set holds: a page, SQL, keep-lists"),
    "train": ("cli.train:train", "train dvae | bpe | prior | clip PRESET"),
    "tokenize": ("cli.tokenize:tokenize", "raw shards -> token shards; --worker i/n"),
    "plan": ("cli.plan:plan", "does it fit, how fast, on which mesh, for how many days"),
    "sample": ("cli.sample:sample", "captions -> candidates, reranked, as a PNG grid"),
    "serve": ("cli.sample:serve", "a page to draw with, and the images API that tools know"),
    "evaluate": ("cli.evaluate:evaluate", "caption accuracy for best-of-N, or one suite (--suite)"),
    "score": ("cli.evaluate:score", "FID and IS on MS-COCO, CUB or a packed set"),
    "submit": ("cli.cluster:submit", "send a run file: local, Slurm or Kubernetes"),
    "status": ("cli.cluster:status", "progress of a submitted run or a job of workers"),
    "logs": ("cli.cluster:logs", "the output of a submitted run's jobs; -f follows"),
    "cancel": ("cli.cluster:cancel", "end all jobs of a submitted run"),
    "resume": ("cli.cluster:resume", "submit a run's unfinished and failed jobs again"),
    "job": ("cli.cluster:job", "run a command as one job of a chain (written by submit)"),
    "overlap": ("cli.evaluate:overlap", "pairs whose picture is also in an evaluation set"),
    "rehearse": (
        "cli.rehearse:rehearse_verb",
        "prove that all ranks' collectives match, before a cluster is paid for",
    ),
    "report": ("cli.sample:report", "report.html of a demo or run, leaderboard.md of suites"),
    "export": (
        "cli.export:export",
        "models -> one folder of safetensors for the hub, or OpenAI's layout",
    ),
    "import": (
        "cli.export:import_",
        "an exported folder -> finished models, with the same digests",
    ),
    "profile": ("cli.profile:profile", "where the time of a run's steps goes"),
    "watch": ("cli.profile:watch", "runs live in this terminal: loss, speed, time, memory"),
    "diverge": ("cli.inspect:diverge", "the first tensor in which two runs differ"),
    "replay": ("cli.inspect:replay", "run a rejected step again, on one process"),
    "seen": ("cli.inspect:seen", "the training steps at which a pair is read"),
    "batch": ("cli.inspect:batch", "the pairs of a training step"),
    "doctor": ("cli.doctor:doctor", "is this machine, cluster and store ready? how to fix it"),
    "verify": ("cli.inspect:verify", "check every digest of a data set or checkpoint"),
}


def main() -> None:
    """Run one verb and exit: 0 done, else as in docs/reference/exit-codes.md."""
    _open_standard_streams()
    code: int | str | None = 0
    try:
        _run()
    except SystemExit as ended:
        code = ended.code
    if not _write():
        code = code or 1
    if code:
        sys.exit(code)


def _write(text: str = "") -> bool:
    """Write text and what is buffered; False if that fails. `tapir ... | head` says nothing."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or exit flushes again
        if not isinstance(error, BrokenPipeError):
            message = f"tapir: cannot write to standard output: {error.strerror}"
            print(message, file=sys.stderr)
        return False
    return True


def _open_standard_streams() -> None:
    """Replace closed streams by the null device; else the next opened file gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _run() -> None:
    _use_utf8()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # before torch, here and in children
    try:
        _import_own_packages(Path.cwd())
    except FileNotFoundError:
        _fail("the current folder was deleted: cd into another one", 2)
    errors = importlib.import_module("core.errors")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        written = _write(_help() + "\n")
        sys.exit(errors.EXIT_WRONG_INPUT if not arguments else int(not written))
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        hint = errors.did_you_mean(verb, VERBS)
        _fail(
            f"there is no verb {verb!r}{hint} (`tapir --help` lists them)", errors.EXIT_WRONG_INPUT
        )
    module, function = VERBS[verb][0].split(":")
    try:
        importlib.import_module("core.log").set_up_logging()
        getattr(importlib.import_module(module), function)(rest)
    except errors.TapirError as error:
        _fail_by(error)
    except BrokenPipeError:
        sys.exit(errors.EXIT_FAILED)
    except OSError as error:
        _fail_by(errors.of_memory(error) if errors.no_memory(error) else errors.of_files(error))
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted; all processes were ended", 130)
    except Exception as error:
        if not errors.no_memory(error):
            importlib.import_module("core.files.reason").leave_reason(error)
            raise
        _fail_by(errors.of_memory(error))


def _use_utf8() -> None:
    """Read and write UTF-8 in every locale, here and in every process that is started from here."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8


def _import_own_packages(here: Path) -> None:
    """Let no file of the current folder or of PYTHONPATH hide our packages, here or in children."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if not sys.flags.safe_path and Path(sys.path[0]).absolute() == here and here != HOME:
        del sys.path[0]
    if any(map(_hides, sys.path)):
        sys.path.insert(0, str(HOME))
    if "PYTHONPATH" in os.environ:  # in which an empty entry means the current folder
        named = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path]
        first = [str(HOME)] if any(map(_hides, named)) else []
        os.environ["PYTHONPATH"] = os.pathsep.join(first + named)


def _hides(path: str) -> bool:
    """True if a folder of the module search path holds a module with one of our names."""
    folder = Path(path)
    names = [entry for name in PACKAGES for entry in (name, f"{name}.py")]
    return folder.resolve() != HOME and any((folder / name).exists() for name in names)


def _help() -> str:
    rows = "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
    return (
        "usage: tapir VERB [--help] ...\n\n"
        "Train DALL-E-class text-to-image models, from raw pairs to ranked pictures.\n\n"
        f"{rows}\n\nEvery verb has --help. Exit codes: 0 done, 2 wrong input, 70 gave up (no other "
        "start mends it), 75 stopped with a checkpoint saved, 130 Ctrl-C, 1 failed."
    )


def _fail_by(error: Any) -> None:
    """End with a TapirError; the job that runs this command learns it, too."""
    importlib.import_module("core.files.reason").leave_reason(error)
    _fail(str(error), error.exit_code)


def _fail(message: str, code: int) -> None:
    print(f"tapir: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
