"""What a file's name says: a picture, a picture of a type that is not read, an archive, or metadata
that a file system left there.
"""

from pathlib import PurePath

from data_pipeline.images.crops import EXTENSIONS

CAPTION, NOTE = "txt", "json"
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
_OTHER_PICTURES = frozenset(
    (
        *("apng", "arw", "avif", "avifs", "bmp", "cr2", "cr3", "dds", "dib", "dng", "eps", "exr"),
        *("gif", "hdr", "heic", "heics", "heif", "hif", "icns", "ico", "j2c", "j2k", "jp2", "jpf"),
        *("jpx", "jxl", "mpo", "nef", "orf", "pbm", "pcx", "pgm", "pnm", "ppm", "psd", "qoi"),
        *("raf", "raw", "rw2", "sgi", "svg", "svgz", "tga", "tif", "tiff", "xbm", "xcf", "xpm"),
    )
)
_OTHER_ARCHIVES = (".zip", ".7z", ".rar", ".tar.zst", ".tzst", ".tar.lz4", ".tar.lz", ".cpio")
_FILES = frozenset(
    (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", ".directory", ".localized")
)
_FOLDERS = frozenset(
    (
        *("__macosx", ".appledouble", ".spotlight-v100", ".trashes", ".fseventsd"),
        *(".temporaryitems", ".documentrevisions-v100", "@eadir", "$recycle.bin"),
        *("system volume information", "lost+found"),
    )
)
IS_METADATA = "is metadata of a file system"


def is_metadata(path: PurePath) -> bool:
    """Say whether macOS, Windows or a NAS left a file there (`._NAME`, `__MACOSX/`, ...)."""
    parts = [part.lower() for part in path.parts]
    name = parts[-1] if parts else ""
    return name.startswith("._") or name in _FILES or not _FOLDERS.isdisjoint(parts)


def is_tar(name: str) -> bool:
    """Say whether a file is named like an archive of pairs."""
    return name.lower().endswith(TARS)


def extension_of(name: str) -> str:
    """What stands behind the last dot, in small letters; nothing if nothing stands before it."""
    stem, _, extension = name.rpartition(".")
    return extension.lower() if stem else ""


def is_picture(name: str) -> bool:
    """Say whether a file is named like a picture of any type, read or not."""
    return extension_of(name) in _OTHER_PICTURES or extension_of(name) in EXTENSIONS


def why_not_read(name: str) -> tuple[str, str]:
    """(kind, reason) of a file that is neither a picture that is read, nor a caption or note."""
    extension = extension_of(name)
    if extension in _OTHER_PICTURES:
        return "image", f"is a picture of the type {extension}; convert it to PNG, JPEG or WebP"
    if name.lower().endswith(_OTHER_ARCHIVES) or is_tar(name):
        return (
            "archive",
            "is an archive among pairs; unpack it, or pack it by itself if it is a tar",
        )
    return "ignored", "is no picture and no .txt caption"
