"""Tapir's exceptions and their exit codes."""

import difflib
import errno
from collections.abc import Iterable, Mapping

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_GAVE_UP = 70
"""EX_SOFTWARE: a crash loop, or an error that no other start mends."""
EXIT_PREEMPTED = 75


class TapirError(Exception):
    """Base of all errors; the message says what failed, where, and what to do."""

    exit_code = EXIT_FAILED
    retry = True
    """True if the same command may succeed when it is started again."""

    def give_up(self) -> None:
        """Take the exit code of errors that no other start mends, if this is one."""
        if not self.retry and self.exit_code == EXIT_FAILED:
            self.exit_code = EXIT_GAVE_UP


class ConfigError(TapirError):
    """The configuration cannot work; the message names every problem with its fix."""

    exit_code = EXIT_WRONG_INPUT

    @classmethod
    def from_problems(cls, problems: list[str]) -> "ConfigError":
        """Join all problems into one error; each has a line if there are several."""
        return cls(joined(problems))

    def of_file(self, path: object) -> "ConfigError":
        """The same problems, with the file in front."""
        gap = "\n" if str(self).startswith("- ") else " "
        return ConfigError(f"{path}:{gap}{self}")


class InputError(TapirError):
    """An input (a file, a caption, a bucket) is missing or unusable."""

    exit_code = EXIT_WRONG_INPUT


class StoreError(TapirError):
    """The object store refused or lost a request."""


class StoreInputError(StoreError):
    """The object store's address, bucket or key is wrong: asking again would not help."""

    exit_code = EXIT_WRONG_INPUT


class AbsentError(StoreInputError):
    """The object does not exist: the store itself answered so."""


class CorruptError(TapirError):
    """Stored bytes differ from the digest written for them."""

    retry = False


class CheckpointError(TapirError):
    """A checkpoint cannot be read or does not fit the model."""

    retry = False


class TrainingError(TapirError):
    """Training makes no progress, and a restart with the same settings would fail again."""

    retry = False


class Preempted(TapirError):
    """The run was asked to stop and has saved a checkpoint: submit it again."""

    exit_code = EXIT_PREEMPTED
    retry = False


def joined(problems: list[str]) -> str:
    """One problem as it is; several as a list with bullets."""
    return problems[0] if len(problems) == 1 else "\n".join(f"- {each}" for each in problems)


def did_you_mean(
    name: object, known: Iterable[object], meant: Mapping[str, str] | None = None
) -> str:
    """Suffix for a message about an unknown name: suggests the closest known one, if any.

    `meant`: what to suggest for a known name, in place of it.
    """
    nearest = difflib.get_close_matches(str(name), [str(each) for each in known], 1)
    return f"; did you mean {(meant or {}).get(nearest[0], nearest[0])!r}?" if nearest else ""


_WRONG_PATHS = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = (
    *("can't allocate memory", "out of memory", "bad_alloc", "Insufficient memory"),
    "Cannot allocate memory",
)
"""Out-of-memory messages of torch's allocators and libraries, OpenCV and the OS."""


def if_full(error: OSError) -> str:
    """Advice for a full disk or an exhausted quota; empty for another error."""
    return "; free space there and start again" if error.errno in _FULL else ""


def no_memory(error: BaseException) -> bool:
    """True if host or device memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    known_kind = isinstance(error, RuntimeError | OSError) or type(error).__module__ == "cv2"
    return known_kind and any(text in str(error) for text in _NO_MEMORY)


def of_memory(error: BaseException) -> ConfigError:
    """Turn an out-of-memory error into one with advice."""
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return ConfigError(
        f"memory ran out: {reason}; end what holds memory, raise a limit (ulimit -v, a control "
        "group's), or ask for less at once (a smaller batch, fewer candidates, fewer ranks); what "
        "was finished before is whole"
    )


def of_files(error: OSError) -> TapirError:
    """Turn an OSError into an InputError for a wrong path, else into a TapirError."""
    where = f" {error.filename}" if error.filename else ""
    reason = (error.strerror or str(error)) + if_full(error)
    if isinstance(error, _WRONG_PATHS) or error.errno == errno.EROFS:
        return InputError(f"cannot use the path{where}: {reason}; give another one")
    return TapirError(f"cannot read or write{where}: {reason}; what was finished before is whole")


class RankError(TapirError):
    """A rank died or failed; the message names it."""

    step = -1
    """The last step that any rank had finished; -1 if there was none."""
