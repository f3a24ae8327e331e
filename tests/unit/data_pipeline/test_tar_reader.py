"""The reader of tars ends as Python's tarfile does, on plain, odd and damaged archives."""

import io
import tarfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.sources.tar_reader import Header, TarReader
from tests.in_place import img2dataset, tar_bytes
from tests.unit.data_pipeline.test_archives import seal

MOST = 700
"""Bytes that are read of a member at most."""
FORMATS = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
KINDS = (
    *(tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE),
    *(tarfile.FIFOTYPE, tarfile.CONTTYPE, b"V"),
)
Rows = list[Any]


class _Stream:
    """A stream that gives at most some bytes a read, and fails after `fails` of them."""

    def __init__(self, data: bytes, step: int, fails: int = 2**40) -> None:
        self._data, self._step, self._fails = io.BytesIO(data), step, fails

    def read(self, size: int = -1) -> bytes:
        if self._data.tell() >= self._fails:
            raise EOFError("the stream failed")
        left = self._fails - self._data.tell()
        return self._data.read(min(left, self._step if size < 0 else min(size, self._step)))


def _by_tarfile(stream: Any) -> Rows:
    rows: Rows = []
    try:
        with tarfile.open(
            fileobj=stream, mode="r|", tarinfo=Header, ignore_zeros=True, bufsize=2**17
        ) as tar:
            while (member := tar.next()) is not None:
                end = tar.offset
                size = -1 if member.size <= MOST else MOST
                read = tar.extractfile(member) if member.isfile() else None
                content = read.read(size) if read else None
                rows.append(_row(member, end, tar.pax_headers, content))
            rows.append(getattr(tar, "has_ended", False))
    except Exception as error:
        rows.append((type(error), str(error)))
    return rows


def _by_reader(stream: Any) -> Rows:
    rows: Rows = []
    try:
        tar = TarReader(stream)
        while (member := tar.next()) is not None:
            end = tar.offset
            content = tar.content(member, MOST) if member.isfile() else None
            rows.append(_row(member, end, tar.pax_headers, content))
        rows.append(tar.has_ended)
    except Exception as error:
        rows.append((type(error), str(error)))
    return rows


def _row(member: tarfile.TarInfo, end: int, pax: Any, content: bytes | None) -> Rows:
    kinds = member.isfile(), member.isdir(), member.issym(), member.islnk()
    return [member.name, member.size, member.offset, end, *kinds, dict(pax), content]


@st.composite
def _archives(draw: st.DrawFn) -> bytes:
    """One or two tars, the end mark of the first in the middle, with odd members among plain."""
    whole = b""
    for _ in range(draw(st.integers(1, 2))):
        buffer = io.BytesIO()
        form = draw(st.sampled_from(FORMATS))
        common = draw(
            st.sampled_from([{}, {}, {}, {"comment": "x"}, {"gname": "y"}, {"path": "z.png"}])
        )
        with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers=common) as tar:
            for _ in range(draw(st.integers(0, 8))):
                with suppress(ValueError):  # ustar has no long names and large numbers
                    tar.addfile(*draw(_members()))
        whole += buffer.getvalue()
    return whole


@st.composite
def _members(draw: st.DrawFn) -> tuple[tarfile.TarInfo, io.BytesIO]:
    name = draw(st.sampled_from(["a.png", "a/b.txt", "\u00e9.png", "./x.json", "f/"]))
    name = draw(st.sampled_from([name, name, "d" * 90 + "/" + name, "e" * 120 + name]))
    info = tarfile.TarInfo(name)
    info.type = draw(st.sampled_from([*[tarfile.REGTYPE] * 12, *KINDS]))
    info.linkname = "a.png" if info.issym() or info.islnk() else ""
    info.mtime = draw(st.sampled_from([0, 1_700_000_000, 1_700_000_000.25, 2**40]))
    info.uid = draw(st.sampled_from([0, 1000, 2**30]))
    info.uname = draw(st.sampled_from(["", "me", "m\u00fc"]))
    if draw(st.integers(0, 9)) == 0:
        info.pax_headers = {draw(st.sampled_from(["size", "path", "atime", "note"])): "512"}
    data = b""
    if info.isfile() or info.type == b"V":
        data = b"x" * draw(st.sampled_from([0, 1, 511, 512, 513, 699, 700, 701, 140_000]))
    info.size = len(data)
    return info, io.BytesIO(data)


def _damaged(data: bytes, flips: list[tuple[int, int]], sealed: bool, cut: int) -> bytes:
    """Bytes of headers are changed; `sealed`: with valid checksums. Ends after `cut`, if not 0."""
    copy = bytearray(data)
    headers = [at for at in range(0, len(copy) - 511, 512) if copy[at + 257 : at + 262] == b"ustar"]
    for place, byte in flips:
        if headers:
            copy[headers[place // 512 % len(headers)] + place % 512] ^= byte
    if sealed:
        seal(copy)
    return bytes(copy[: cut % len(copy)]) if cut and copy else bytes(copy)


@given(
    _archives(),
    st.lists(st.tuples(st.integers(0, 2**14), st.integers(1, 255)), max_size=3),
    st.booleans(),
    st.one_of(st.just(0), st.integers(1, 2**18)),
    st.sampled_from([700, 2**17, 2**17]),
    st.one_of(st.just(2**40), st.integers(1, 2**18)),
)
@example(b"", [], False, 0, 700, 2**40)
def test_any_archive_is_read_as_by_tarfile(
    data: bytes, flips: list[tuple[int, int]], sealed: bool, cut: int, step: int, fails: int
) -> None:
    whole = _damaged(data, flips, sealed, cut)
    expected = _by_tarfile(_Stream(whole, step, fails))
    assert _by_reader(_Stream(whole, step, fails)) == expected


def _times(members: list[tuple[str, bytes]]) -> bytes:
    """As webdataset writes them: the time of each file is a fraction, in a pax header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.123
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _gnu(members: list[tuple[str, bytes]]) -> bytes:
    return tar_bytes(members, tarfile.GNU_FORMAT)


@pytest.mark.parametrize(("form", "first"), [(tar_bytes, 1), (_gnu, 1), (_times, 2)])
def test_plain_headers_are_not_left_to_tarfile(
    form: Callable[[list[tuple[str, bytes]]], bytes], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    original = tarfile.TarInfo.frombuf.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, buf: bytes, *rest: Any) -> Any:
        parsed.append(any(buf))
        return original(cls, buf, *rest)

    data = form([*img2dataset(0, 20), ("f" * 60 + "/" + "g" * 60, b"x")])
    monkeypatch.setattr(tarfile.TarInfo, "frombuf", classmethod(counted))
    rows = _by_reader(io.BytesIO(data))
    assert len(rows) == 62 and rows[-1] is True
    assert sum(parsed) <= first + 2, "the first member, and a long name of GNU"


@pytest.mark.parametrize(
    "records",
    [
        *("16 path=b.png", "10 size=1", "22 hdrcharset=BINARY", "14 mtime=1.50", "0 mtime=1.50"),
        *("14 mtime=1.50\n16 path=b.png", "14 mtime=1.50\n14 atime=1.50"),
    ],
)
def test_a_pax_header_that_may_change_a_member_is_left_to_tarfile(records: str) -> None:
    """Also if the length of a record is wrong, and if the block has more than its size."""
    whole = bytearray(_times([("a.png", b"a"), ("b.png", b"b"), ("c.png", b"c")]))
    text = f"{records}\n".encode()
    for at in range(0, len(whole), 512):
        if b"mtime=" in whole[at : at + 512]:
            for size in (len(text), 14, 512, 5):
                changed = whole.copy()
                changed[at : at + 512] = text.ljust(512, b"\0")
                changed[at - 512 + 124 : at - 512 + 136] = b"%011o\0" % size
                seal(changed)
                expected = _by_tarfile(io.BytesIO(changed))
                assert _by_reader(io.BytesIO(changed)) == expected


@pytest.mark.parametrize("sealed", [False, True])
def test_a_changed_byte_of_a_header_ends_as_by_tarfile(sealed: bool) -> None:
    whole = tar_bytes([("a.png", b"a"), ("b.png", b"b"), ("c.png", b"c")])
    for place in range(512):
        for byte in (1, 0x80):
            changed = bytearray(whole)
            changed[1024 + place] ^= byte
            if sealed:
                seal(changed)
            expected = _by_tarfile(io.BytesIO(changed))
            assert _by_reader(io.BytesIO(changed)) == expected, place


@pytest.mark.parametrize("headers", [{"path": "z.png"}, {"size": "1"}])
def test_global_pax_headers_change_all_members(headers: dict[str, str]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", pax_headers=headers) as tar:
        for name in ("a.png", "b.png", "c.png"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ab"))
    rows = _by_reader(io.BytesIO(buffer.getvalue()))
    assert rows == _by_tarfile(io.BytesIO(buffer.getvalue())) and len(rows) == 4
