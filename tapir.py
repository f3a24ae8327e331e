"""The front door: `tapir VERB`. Verbs are imported only when they are called."""

import difflib
import importlib
import sys

from core.errors import EXIT_FAILED, EXIT_WRONG_INPUT, TapirError, no_memory, of_files, of_memory

VERBS = {
    "demo": ("generation.commands:demo", "the whole way on this machine; ends with report.html"),
    "pack": ("data_pipeline.commands:pack", "raw pairs -> shards in a store, split by key"),
    "train": ("training.train:train", "train dvae | bpe | prior | clip PRESET"),
    "tokenize": ("training.commands:tokenize", "raw shards -> token shards; --worker i/n"),
    "plan": ("planning.commands:plan", "does it fit, how fast, on which mesh, for how many days"),
    "sample": ("generation.commands:sample", "captions -> candidates, reranked, as a PNG grid"),
    "evaluate": ("generation.commands:evaluate", "caption accuracy for best-of-N on shapes"),
    "score": ("generation.commands:score", "FID and IS on MS-COCO, CUB or a packed set; i/n"),
    "submit": ("generation.submit:submit", "send a run file: local, Slurm or Kubernetes"),
    "status": ("generation.submit:status", "how far a submitted run, or a token job, is"),
    "logs": ("generation.submit:logs", "the output of a submitted run's jobs; -f follows"),
    "cancel": ("generation.submit:cancel", "end all jobs of a submitted run"),
    "resume": ("generation.submit:resume", "send the jobs again that have not ended well"),
    "job": ("generation.submit:job", "run a command as one job of a chain (written by submit)"),
    "overlap": ("generation.commands:overlap", "pairs that an evaluation set has, too"),
    "rehearse": (
        "planning.rehearse_commands:rehearse_verb",
        "prove that all ranks' collectives match, before a cluster is paid for",
    ),
    "report": ("generation.commands:report", "write a demo folder's report.html again"),
    "export": (
        "training.commands:export",
        "models -> one folder of safetensors for the hub, or OpenAI's layout",
    ),
    "import": (
        "training.commands:import_",
        "such a folder -> finished models, with the same digests",
    ),
    "profile": ("training.profile_commands:profile", "where the time of a run's steps goes"),
    "watch": ("training.watch:watch", "runs live in this terminal: loss, speed, time, memory"),
    "diverge": ("training.commands:diverge", "the first tensor in which two runs differ"),
    "replay": ("training.commands:replay", "run a step that did not count again, on one process"),
    "seen": ("training.commands:seen", "the training steps at which a pair is read"),
    "batch": ("training.commands:batch", "the pairs of a training step"),
    "doctor": ("training.doctor:doctor", "is this machine, cluster and store ready? how to mend"),
    "verify": ("training.commands:verify", "check every digest of a data set or checkpoint"),
}


def main() -> None:
    """Run one verb and exit: 0 done, 2 wrong input or config, 1 anything else."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0 if arguments else EXIT_WRONG_INPUT)
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        _fail(f"there is no verb {verb!r}{hint}\n{_help()}", EXIT_WRONG_INPUT)
    module, function = VERBS[verb][0].split(":")
    try:
        importlib.import_module("core.log").set_up_logging()
        getattr(importlib.import_module(module), function)(rest)
    except TapirError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)
    except OSError as error:
        wrong = of_memory(error) if no_memory(error) else of_files(error)
        _fail(str(wrong), wrong.exit_code)
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted; all processes were ended", 130)
    except Exception as error:
        if not no_memory(error):
            raise
        _fail(str(of_memory(error)), EXIT_WRONG_INPUT)


def _help() -> str:
    rows = "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
    return (
        "usage: tapir VERB [--help] ...\n\n"
        "Train DALL-E-class text-to-image models, from raw pairs to ranked pictures.\n\n"
        f"{rows}\n\nEvery verb has --help. Exit codes: 0 done, 2 wrong input, 75 stopped with a "
        "checkpoint saved, 130 Ctrl-C, 1 failed."
    )


def _fail(message: str, code: int) -> None:
    print(f"tapir: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
