"""A shard that is built member by member, byte for byte as the webdataset library writes it.

webdataset's own writer takes a tenth of the time in which a small picture is decoded.
"""

import io
import tarfile

_NAME, _SIZE = slice(0, 100), slice(124, 136)
_CHECKSUM = slice(148, 156)


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    info.uname = info.gname = "tapir"
    return info


_HEADER = _info("", 0).tobuf(tarfile.USTAR_FORMAT)


class TarBuffer:
    """A tar in memory; equal members, equal bytes."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self.size = 0
        """Offset of the next member's header."""

    def add(self, name: str, data: bytes) -> None:
        """Append a member."""
        header = _header(name, len(data))
        padding = -len(data) % tarfile.BLOCKSIZE
        self._buffer.write(header)
        self._buffer.write(data)
        self._buffer.write(bytes(padding))
        self.size += len(header) + len(data) + padding

    def finish(self) -> bytes:
        """The whole tar, with its end mark."""
        end = self.size + 2 * tarfile.BLOCKSIZE
        self._buffer.write(bytes(end - self.size + -end % tarfile.RECORDSIZE))
        return self._buffer.getvalue()


def _header(name: str, size: int) -> bytes:
    """TarInfo.tobuf for short names without its tenth of a millisecond."""
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        return _info(name, size).tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    header = bytearray(_HEADER)
    header[_NAME] = name.encode().ljust(100, b"\0")
    header[_SIZE] = b"%011o\0" % size
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)
