"""File types by name: pictures, unsupported pictures, archives, and file-system metadata."""

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
    """True for files that macOS, Windows or a NAS create (`._NAME`, `__MACOSX/`, ...)."""
    parts = [part.lower() for part in path.parts]
    name = parts[-1] if parts else ""
    return name.startswith("._") or name in _FILES or not _FOLDERS.isdisjoint(parts)


def is_tar(name: str) -> bool:
    """True for the name of a supported archive."""
    return name.lower().endswith(TARS)


def extension_of(name: str) -> str:
    """The extension in lower case, without the dot; empty for names like `.txt`."""
    stem, _, extension = name.rpartition(".")
    return extension.lower() if stem else ""


def is_picture(name: str) -> bool:
    """True for the name of a picture, supported or not."""
    return extension_of(name) in _OTHER_PICTURES or extension_of(name) in EXTENSIONS


def why_not_read(name: str) -> tuple[str, str]:
    """(kind, reason) for rejecting a file that is not a supported picture, caption or note."""
    extension = extension_of(name)
    if extension in _OTHER_PICTURES:
        return "image", f"is a picture of the type {extension}; convert it to PNG, JPEG or WebP"
    if name.lower().endswith(_OTHER_ARCHIVES) or is_tar(name):
        return (
            "archive",
            "is an archive among pairs; unpack it, or pack it by itself if it is a tar",
        )
    return "ignored", "is neither a picture nor a .txt caption"
