"""The checks of one node; a second or two, without torch."""

from cluster.doctor import folders, gpus, limits, machine, programs
from cluster.doctor.config import DoctorConfig
from cluster.doctor.finding import Check, Finding, placed, run_checks
from core.config import S3
from core.storage.mixture import data_sets

LIMIT = 30.0
"""Seconds after which a check counts as hanging."""
_SMALL, _LARGE = 1_000_000, 16_000_000
"""Bytes of the store probe: quick, full."""


def node_findings(config: DoctorConfig, rank: int | None) -> list[Finding]:
    """All rows of this machine; checks that hang or fail become rows."""
    size = _SMALL if config.node or config.quick else _LARGE
    checks: dict[str, Check] = {
        "python": machine.python_findings,
        "packages": machine.package_findings,
        "host name": machine.host_findings,
        "memory": lambda: machine.memory_findings(config.memory),
        "limits": lambda: limits.limit_findings(config.files),
        "shared memory": lambda: folders.shared_memory_findings(config.shared_memory),
        folders.RUN_FOLDER: lambda: folders.run_folder_findings(config.out, config.disk),
        "temporary folder": folders.temporary_findings,
        "sockets": folders.socket_findings,
        "gpus": lambda: gpus.gpu_findings(config.gpus),
    }
    if config.data:
        checks["store"] = lambda: _store_findings(config, size)
    if any(each.place.startswith(S3) for each in data_sets(config.data)):
        checks["clock"] = _store_clock_findings
    if config.scheduler != "none":
        checks["scheduler"] = lambda: programs.scheduler_findings(config.scheduler)
    return placed(run_checks(checks, LIMIT), rank)


def _store_findings(config: DoctorConfig, size: int) -> list[Finding]:
    from cluster.doctor import stores  # noqa: PLC0415 - boto3: a second, and its import may fail

    return [
        row
        for each in data_sets(config.data)
        for row in stores.store_findings(each.place, config.rights, size)
    ]


def _store_clock_findings() -> list[Finding]:
    from cluster.doctor import stores  # noqa: PLC0415 - as above

    return stores.store_clock_findings()
