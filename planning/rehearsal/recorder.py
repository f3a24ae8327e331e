"""Record this rank's communication at torch's dispatcher, below every library.

The same recorder records rehearsed and real ranks, so that both can be compared. The reduction
(sum, maximum) is not visible at the dispatcher and not recorded.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import BackendConfig
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from parallel.world import World
from planning.rehearsal.patches import replaced
from planning.rehearsal.sequence import CREATE, OBJECTS, CollectiveCall, Sequence

NAMESPACE = "c10d"
"""The dispatcher's namespace of collectives."""
ROOT = Path(__file__).parents[2]
_KINDS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather_into_tensor",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all_single",
    "recv_any_source_": "recv",
}
"""The dispatcher's names -> torch.distributed's; others only lose their underscores."""
_OF_ONE_SIDE = {"gather_": 1, "scatter_": 0}
"""Operations whose larger side only the root has -> index of the argument that all ranks have."""
_PEERS = ("root_rank", "dst", "src")
_LIBRARIES = ("deepspeed", "megatron")
_WRAPPERS = ("deepspeed/comm/", "deepspeed/utils/", "deepspeed/runtime/pipe/p2p.py")
_OWN = ("parallel", "models", "training")
_TENSOR = "parallel/tensor/"
"""Layers that wrap one another around a call: the innermost is enough."""
_PLACES = 3
_DEPTH = 14
"""Maximum stack frames from a function of torch.distributed to the dispatcher, with a margin."""
_C10D = dist.distributed_c10d.__file__


class Recorder:
    """The operations of this rank so far."""

    def __init__(self, rank: int) -> None:
        self.sequence = Sequence(rank=rank)
        self._groups: dict[str, tuple[int, ...]] = {}
        self._backends: dict[str, dict[str, str]] = {}
        """By group and type of device."""
        self._made = 0

    def note(self, function: Any, arguments: tuple[Any, ...]) -> CollectiveCall:
        """Add a call of the dispatcher.

        Raises: RuntimeError if the group has no backend for the tensors' device.
        """
        self.close_groups()
        name = function._schema.name.split("::")[1]
        named = dict(zip(_argument_names(function), arguments, strict=False))
        name_of_group, group = self._members(dist.ProcessGroup.unbox(named["process_group"]))
        peer = next((int(named[key]) for key in _PEERS if key in named), -1)
        root = group[peer] if peer >= 0 else -1
        kind = _KINDS.get(name, name.strip("_"))
        tensors = _tensors(name, arguments) if kind != "barrier" else []
        paired = kind in ("send", "recv")
        kind = f"i{kind}" if paired and _goes_on(f"i{kind}") else kind
        objects = _carries_objects()
        device = next(x.device.type for x in tree_leaves(arguments) if isinstance(x, Tensor))
        operation = CollectiveCall(
            kind=kind,
            group=(root,) if paired else group,
            bytes=0 if objects else sum(t.numel() * t.element_size() for t in tensors),
            dtype=OBJECTS if objects else _name_of(tensors),
            root=-1 if paired else root,
            device=device,
            backend=self._backend(name_of_group, device, kind),
            places=places(),
        )
        self.sequence.operations.append(operation)
        return operation

    def note_texts(self, group: "dist.ProcessGroup") -> None:
        """Add a gather of texts, whichever messages carry them."""
        self.close_groups()
        name, ranks = self._members(group)
        self.sequence.operations.append(
            CollectiveCall(
                kind="gather_text",
                group=ranks,
                bytes=0,
                dtype=OBJECTS,
                device="cpu",
                backend=self._backend(name, "cpu", "gather_text"),
                places=places(),
            )
        )

    def note_group(self, ranks: tuple[int, ...]) -> None:
        """Record a group that all ranks create."""
        self.sequence.created.append(ranks)
        if self._made == 0:
            self._where = places()
        self._made += 1

    def close_groups(self) -> None:
        """Record the groups created since the last operation as one operation."""
        if not self._made:
            return
        made = repr(self.sequence.created[-self._made :]).encode()
        self.sequence.operations.append(
            CollectiveCall(
                kind=CREATE,
                group=tuple(range(dist.get_world_size())),
                bytes=self._made,
                dtype="",
                detail=hashlib.sha256(made).hexdigest()[:16],
                places=self._where,
            )
        )
        self._made = 0

    def note_backends(self, group: Any, config: str) -> None:
        """Remember a group's backends, from the config it was created with."""
        self._backends[group.group_name] = backends_of(config)

    def repeat(self, first: int, last: int) -> None:
        """Record a range of operations once more."""
        self.sequence.operations += self.sequence.operations[first:last]

    def _members(self, group: "dist.ProcessGroup") -> tuple[str, tuple[int, ...]]:
        name = group.group_name
        if name not in self._groups:
            self._groups[name] = tuple(dist.get_process_group_ranks(group))
            if name not in self._backends:
                self.note_backends(group, dist.get_backend_config(group))
        return name, self._groups[name]

    def _backend(self, group: str, device: str, kind: str) -> str:
        known = self._backends[group]
        if device not in known:
            there = ", ".join(f"{name} for {type_}" for type_, name in known.items())
            raise RuntimeError(
                f"{kind} of a tensor on {device}, over a group that has only {there}; make the "
                "tensor on mesh.world.device"
            )
        return known[device]


class Listening(TorchDispatchMode):
    """Runs every function and records communication; for real ranks."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function.namespace == NAMESPACE:
            self._recorder.note(function, arguments)
        return function(*arguments, **(named or {}))


def backends_of(config: str) -> dict[str, str]:
    """`cpu:gloo,cuda:nccl`, or the name of one backend -> its backends by type of device."""
    backends = BackendConfig(dist.Backend(config)).get_device_backend_map()
    return {device: str(backend) for device, backend in backends.items()}


@contextmanager
def groups_noted(
    recorder: Recorder, change: Callable[[dict[str, Any]], str | None]
) -> Iterator[None]:
    """Record every `new_group` within the context.

    `change` may alter its keyword arguments; it returns the requested backends if it replaced them.
    """
    modules = (dist, dist.distributed_c10d)
    original = dist.new_group

    @functools.wraps(original)
    def new_group(ranks: Any = None, *arguments: Any, **named: Any) -> Any:
        if not named.get("use_local_synchronization"):
            whole = range(dist.get_world_size())
            recorder.note_group(tuple(whole if ranks is None else ranks))
        asked = change(named)
        group = original(ranks, *arguments, **named)
        if asked and group is not dist.GroupMember.NON_GROUP_MEMBER:
            recorder.note_backends(group, asked)
        return group

    try:
        for module in modules:
            module.new_group = new_group  # type: ignore[attr-defined]
        yield
    finally:
        recorder.close_groups()
        for module in modules:
            module.new_group = original  # type: ignore[attr-defined]


@contextmanager
def texts_noted(recorder: Recorder, rehearsed: bool) -> Iterator[None]:
    """Record a gather of texts as one operation; a rehearsed rank hears only itself."""
    gather = World._gather

    def gathered(world: World, text: str, group: "dist.ProcessGroup | None") -> list[str]:
        if group is not None:
            recorder.note_texts(group)
        if rehearsed:
            return [text] * (world.size if world.rank == 0 else 1)
        with _disable_current_modes():
            return gather(world, text, group)

    with replaced([(World, "_gather", gathered)]):
        yield


def places(frame: FrameType | None = None) -> tuple[str, ...]:
    """Code locations of a frame, or of the caller: the innermost library line, then Tapir's."""
    lines: list[str] = []
    frame = frame or sys._getframe(1)
    while frame is not None and len(lines) < _PLACES:
        name = _known_file(frame.f_code.co_filename)
        wraps = bool(lines) and name.startswith(_TENSOR) and lines[-1].startswith(_TENSOR)
        if name and (not lines or not name.startswith(_LIBRARIES)) and not wraps:
            lines.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(lines)


def _carries_objects() -> bool:
    """True within torch's functions that exchange pickled objects."""
    return any("_object" in name for name in _functions())


def _goes_on(name: str) -> bool:
    """True within torch's function of this name, unless a blocking one has called it."""
    names = list(_functions())
    return name in names and name.removeprefix("i") not in names


def _functions() -> Iterator[str]:
    """Names of torch.distributed's functions that lead to the dispatcher, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return
        if frame.f_code.co_filename == _C10D:
            yield frame.f_code.co_name
        frame = frame.f_back


def _name_of(tensors: list[Tensor]) -> str:
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else ""


@functools.cache
def _known_file(path: str) -> str:
    """Short name of a file of Tapir or of a training library; empty for all others."""
    for library in _LIBRARIES:
        for folder in getattr(sys.modules.get(library), "__path__", ()):
            if Path(path).is_relative_to(folder):
                short = str(Path(path).relative_to(Path(folder).parent))
                return "" if short.startswith(_WRAPPERS) else short
    if not Path(path).is_relative_to(ROOT):
        return ""
    inside = Path(path).relative_to(ROOT)
    return str(inside) if inside.parts[0] in _OWN else ""


@functools.cache
def _argument_names(function: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in function._schema.arguments)


def _tensors(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of the larger side."""
    if name in _OF_ONE_SIDE:
        sides = [arguments[_OF_ONE_SIDE[name]]]
    else:
        sides = [a for a in arguments[:2] if isinstance(a, Tensor | list | tuple)]
    sided = [[t for t in tree_leaves(side) if isinstance(t, Tensor)] for side in sides]
    return max(sided, key=lambda side: sum(t.numel() for t in side), default=[])
