"""The flags of a config or function: unknown ones are refused with the closest right one."""

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from core.errors import InputError, did_you_mean, joined
from core.renamed import new_names

_HELP = ("-h", "--help")
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class KnownFlags:
    """Names of flags, dotted and with underscores, without dashes."""

    types: dict[str, Any]
    """Name -> type of its value."""
    renamed: dict[str, str]
    """Old name -> new name."""
    positional: bool
    """True if there are arguments without a flag."""

    def hint(self, given: str, write: Callable[[str, bool], str]) -> str:
        """Suffix for a message about an unknown flag.

        A boolean counts in all spellings (a.no_b, no_a.b), an old name as its new one, and a last
        part alone as a whole name. `write`: text of a name, and whether it is negated.
        """
        given = given.replace("-", "_")
        meant: dict[str, str] = {}
        for old, new in ({name: name for name in self.types} | self.renamed).items():
            meant.setdefault(old, write(new, False))
            if self.types.get(new) is bool:
                owner, dot, field = old.rpartition(".")
                for text in (f"{owner}{dot}no_{field}", f"no_{old}"):
                    meant.setdefault(text, write(new, True))
        last: dict[str, str] = {}
        for name, text in meant.items():
            last.setdefault(name.rpartition(".")[2], text)
        whole = did_you_mean(given, meant, meant)
        return whole or did_you_mean(given.rpartition(".")[2], last, last)

    def negated(self, name: str) -> str:
        """The boolean that `a.no_b` negates; empty for another name."""
        owner, dot, field = name.rpartition(".")
        positive = f"{owner}{dot}{field.removeprefix('no_')}"
        positive = self.renamed.get(positive, positive)
        return positive if name != positive and self.types.get(positive) is bool else ""


def known_flags(kind: Any, flat: bool = False) -> KnownFlags:
    """The flags that tyro makes of a config class, or of a function's parameters.

    `flat`: flags of nested configs have no prefix.
    """
    rows = list(_flags(kind, "", flat))
    return KnownFlags(
        types={name: hint for name, hint, _ in rows if name and hint is not None},
        renamed={name: new for name, _, new in rows if new},
        positional=any(not name for name, _, _ in rows),
    )


def _flags(kind: Any, prefix: str, flat: bool) -> Iterator[tuple[str, Any, str]]:
    """(name, type, "") of each flag, without name if positional; (old, None, new) if renamed."""
    if isinstance(kind, type):
        for old, new in new_names(kind).items():
            yield prefix + old, None, prefix + new
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        plain = get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(plain):
            yield from _flags(plain, prefix if flat else f"{prefix}{name}.", flat)
        elif tyro.conf.Positional in marks:
            yield "", plain, ""
        elif name != "return":
            named = [mark.name for mark in marks if getattr(mark, "name", None)]
            yield prefix + (named[0] if named else name), _without_none(plain), ""


def _without_none(hint: Any) -> Any:
    """X of `X | None`; all of `bool | None`, whose flag takes a value."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [each for each in get_args(hint) if each is not type(None)]
        return rest[0] if len(rest) == 1 and rest[0] is not bool else hint
    return hint


def flag_text(name: str, negated: bool = False) -> str:
    """A flag as it is typed: a.some_flag -> --a.some-flag, negated --a.no-some-flag."""
    owner, dot, field = name.rpartition(".")
    return f"--{owner}{dot}{'no_' if negated else ''}{field}".replace("_", "-")


def refuse_unknown_flags(
    known: KnownFlags, arguments: Sequence[str], verb: str, others: Sequence[str] = ()
) -> None:
    """Check the flags of a command line, unless it asks for help.

    `others`: further flags of the verb, which its caller has read already.
    Raises: InputError for unknown flags and booleans with a value, each with the right spelling.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    arguments = arguments[:end]
    if any(argument in _HELP for argument in arguments):
        return
    extended = dataclasses.replace(known, types={**dict.fromkeys(others), **known.types})
    problems = []
    for at, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or flag.startswith("--tyro-"):
            continue
        positive = known.negated(name)
        if name not in known.types and not positive:
            hint = extended.hint(name, flag_text) or f"; `tapir {verb} --help` lists them"
            problems.append(f"`tapir {verb}` has no flag {flag}{hint}")
        elif positive or known.types[name] is bool:
            following = arguments[at + 1] if at + 1 < len(arguments) else ""
            given = (value if equals else following).lower()
            if equals or (given in _TRUTHS and not known.positional):
                on = _TRUTHS.get(given, True) != bool(positive)
                right = flag_text(positive or name, not on)
                problems.append(f"{flag} takes no value; write {right}")
    if problems:
        raise InputError(joined(problems))
