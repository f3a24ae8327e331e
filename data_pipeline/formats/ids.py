"""ids.bin: where the record of an id is, in two small reads at any number of shards.

    rows     id u64, record u32 (u64 from 2**32 records on), sorted by id
    slots    2**bits + 1 numbers u64: the row at which the ids of each prefix of `bits` bits begin

`record` counts the records of one variant in manifest order. Ids are hashes of 63 bits, so that
prefixes hold about equally many. Rows are sorted in a temporary file: memory does not grow with
the data set, but for 8 bytes a slot of 256 records.
"""

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import CorruptError, InputError, StoreError
from core.storage.store import Store

NAME = "ids.bin"
_ID_BITS = 63
_RUN = 2**18
"""Rows that are partitioned together, and rows of a partition that are sorted together."""
_SLOT = 256
"""Rows of a slot, on average."""
_IN_MEMORY = 2**24
"""Bytes that are kept in memory instead of in a temporary file."""


class RepeatedIdError(InputError):
    """Two records of a set have one id."""


def row_type(records: int) -> np.dtype[Any]:
    """The type of a row in a set of this many records."""
    return np.dtype([("id", "<u8"), ("record", "<u4" if records <= 2**32 else "<u8")])


def _bits(records: int, together: int) -> int:
    """Bits of a prefix that cuts the records into parts of about `together`."""
    return max(0, (records // together).bit_length() - 1)


def _prefixes(ids: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    prefixes: NDArray[np.uint64] = ids >> np.uint64(_ID_BITS - bits)
    return np.minimum(prefixes, np.uint64(2**bits - 1))


class IdSorter:
    """Collects the ids of a set's records, and writes ids.bin; a context manager.

    Raises: InputError, when it is entered, if the temporary folder has no space for them.
    """

    def __init__(self, records: int, where: str) -> None:
        self._records, self._where, self._row = records, where, row_type(records)
        self.bits, self._part_bits = _bits(records, _SLOT), _bits(records, _RUN)
        self._pending: list[NDArray[Any]] = []
        self._rows = self._waiting = 0
        self._runs: list[NDArray[np.int64]] = []
        """For each run in the file, the row at which each partition begins, and the end."""
        self._file: IO[bytes]

    def __enter__(self) -> "IdSorter":
        self._refuse_full_disk()
        kept = tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="tapir-ids-")
        self._file = kept
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, first: int, ids: NDArray[np.uint64], places: NDArray[Any]) -> None:
        """Add a shard: its ids, and their places counted from its `first` record."""
        rows = np.empty(len(ids), self._row)
        rows["id"], rows["record"] = ids, places.astype(np.int64) + first
        self._pending.append(rows)
        self._waiting += len(rows)
        if self._waiting >= _RUN:
            self._write_run()

    def write(self, store: Store, name: str) -> str:
        """Write the table; returns its sha256.

        Raises: InputError if an id occurs twice; CorruptError if ids are missing.
        """
        self._write_run()
        if self._rows != self._records:
            raise CorruptError(
                f"{self._where} has {self._rows} ids in its indexes for {self._records} records; "
                "mend it by the command that made it, with --again"
            )
        digest = hashlib.sha256()

        def parts() -> Iterator[bytes]:
            for part in self._parts():
                digest.update(part)
                yield part

        store.put_parts(name, parts())
        return digest.hexdigest()

    def _write_run(self) -> None:
        """Append the pending rows to the file, ordered by partition."""
        if not self._pending:
            return
        rows = np.concatenate(self._pending)
        self._pending, self._waiting = [], 0
        kind = np.uint16 if self._part_bits <= 16 else np.uint32  # numpy sorts u16 by radix
        partitions = _prefixes(rows["id"], self._part_bits).astype(kind)
        counts = np.bincount(partitions, minlength=2**self._part_bits)
        self._runs.append(self._rows + np.cumsum([0, *counts]))
        rows = rows[np.argsort(partitions, kind="stable")]
        try:
            self._file.write(rows.tobytes())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise StoreError(f"cannot sort the ids of {self._where}: {error}") from error
            raise self._no_space() from error
        self._rows += len(rows)

    def _parts(self) -> Iterator[bytes]:
        slots = np.zeros(2**self.bits + 1, np.int64)
        finer = self.bits - self._part_bits
        for partition in range(2**self._part_bits):
            rows = self._partition(partition)
            same = np.flatnonzero(rows["id"][1:] == rows["id"][:-1])
            if len(same):
                raise RepeatedIdError(
                    f"{self._where} holds two pairs of the id {rows['id'][same[0]]}; give every "
                    "pair its own key"
                )
            first = partition << finer
            inside = (_prefixes(rows["id"], self.bits) - np.uint64(first)).astype(np.int64)
            slots[first + 1 : first + 2**finer + 1] = np.bincount(inside, minlength=2**finer)
            yield rows.tobytes()
        yield np.cumsum(slots).astype("<u8").tobytes()

    def _partition(self, partition: int) -> NDArray[Any]:
        """The rows of a partition, sorted."""
        pieces, width = [np.empty(0, self._row)], self._row.itemsize
        for starts in self._runs:
            first, last = int(starts[partition]), int(starts[partition + 1])
            self._file.seek(first * width)
            pieces.append(np.frombuffer(self._file.read((last - first) * width), self._row))
        rows = np.concatenate(pieces)
        return rows[np.argsort(rows["id"])]

    def _refuse_full_disk(self) -> None:
        size = self._records * self._row.itemsize
        if size > _IN_MEMORY and shutil.disk_usage(tempfile.gettempdir()).free < size:
            raise self._no_space()

    def _no_space(self) -> InputError:
        size = self._records * self._row.itemsize / 2**30
        return InputError(
            f"sorting the ids of {self._where} needs {size:.1f} GiB in {tempfile.gettempdir()}; "
            "free that space or export TMPDIR, a folder on a larger disk"
        )


def find_in_table(store: Store, name: str, records: int, bits: int, target: int) -> int | None:
    """The record of an id in the table `name`, counted in manifest order, or None.

    Raises: CorruptError if the table does not fit the manifest.
    """
    row = row_type(records)
    slot = min(target >> (_ID_BITS - bits), 2**bits - 1)
    slots = store.get(name, records * row.itemsize + 8 * slot, 16)
    first, last = np.frombuffer(slots, "<u8").tolist() if len(slots) == 16 else (1, 0)
    if not first <= last <= records:
        raise _damaged(store, name)
    if first == last:
        return None
    data = store.get(name, first * row.itemsize, (last - first) * row.itemsize)
    if len(data) != (last - first) * row.itemsize:
        raise _damaged(store, name)
    rows = np.frombuffer(data, row)
    at = int(np.searchsorted(rows["id"], np.uint64(target)))
    if at == len(rows) or int(rows["id"][at]) != target:
        return None
    record = int(rows["record"][at])
    if record >= records:
        raise _damaged(store, name)
    return record


def rows_of_table(
    store: Store, name: str, records: int, lookup: dict[str, Any]
) -> Iterator[NDArray[Any]]:
    """The rows of the table `name`, sorted by id, in parts.

    Raises: InputError if the set has none; CorruptError, at the end, if a byte changed.
    """
    row, digest = row_type(records), hashlib.sha256()
    if not lookup:
        raise InputError(
            f"{store.url}/{name} is missing: an older version made this set; run the command that "
            "made it, with --again"
        )
    for first in range(0, records, _RUN):
        data = store.get(name, first * row.itemsize, min(_RUN, records - first) * row.itemsize)
        digest.update(data)
        yield np.frombuffer(data[: len(data) // row.itemsize * row.itemsize], row)
    digest.update(store.get(name, records * row.itemsize))
    if digest.hexdigest() != lookup["sha256"]:
        raise _damaged(store, name)


def _damaged(store: Store, name: str) -> CorruptError:
    return CorruptError(
        f"{store.url}/{name} does not fit its manifest; mend it by the command that made it, "
        "with --again"
    )
