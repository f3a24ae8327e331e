"""Pack of photographs: speed over the work itself, workers, stores, memory, webdataset beside."""

from bench.pack.parent import run

__all__ = ["run"]
