"""Python, packages, host name and memory of this machine."""

import importlib.metadata
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from cluster.doctor.finding import GB, Finding, bad, ok, warning
from core.memory import host_memory

LEAST_PYTHON = (3, 11)
_REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
_LITTLE_MEMORY = 1.0
_NETWORK_GIVEN = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def python_findings() -> list[Finding]:
    """Check the interpreter's version."""
    have = ".".join(map(str, sys.version_info[:3]))
    where = f"Python {have} at {sys.executable}"
    if sys.version_info[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return [bad("python", f"{where}; {least} is needed", f"make the venv with python{least}")]
    return [ok("python", where)]


def package_findings(needs: Sequence[str] | None = None) -> list[Finding]:
    """Check installed versions against `needs`, by default requirements.txt."""
    needs = requirements() if needs is None else needs
    rows = [row for need in needs if (row := _package(need)) is not None]
    return rows or [ok("packages", f"{len(needs)} packages as requirements.txt asks")]


def requirements() -> list[str]:
    """The lines of requirements.txt next to the code, or the installed tapir's requirements."""
    if _REQUIREMENTS.exists():
        lines = (line.partition("#")[0].strip() for line in _REQUIREMENTS.read_text().splitlines())
        return [line for line in lines if line and not line.startswith("-")]
    return list(importlib.metadata.requires("tapir") or [])


def _package(need: str) -> Finding | None:
    try:
        requirement = Requirement(need)
    except InvalidRequirement:
        return warning("packages", f"requirements.txt holds {need!r}", "write it as name>=version")
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    fix = f"{sys.executable} -m pip install '{requirement.name}{requirement.specifier}'"
    try:
        package = importlib.metadata.distribution(requirement.name)
        version = package.metadata["Version"]
    except importlib.metadata.PackageNotFoundError:
        return bad("packages", f"{requirement.name} is not installed", fix)
    if not version:
        where = package.locate_file("")
        return bad("packages", f"{requirement.name} in {where} is installed in parts", fix)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    where = package.locate_file("")
    text = (
        f"{requirement.name} {version} is installed in {where}, {requirement.specifier} is needed"
    )
    return bad("packages", text, f"{fix}; see that no other folder of PYTHONPATH holds another one")


def host_findings() -> list[Finding]:
    """Check that this machine's name resolves; gloo needs it, unless an interface is set."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None)})
    except OSError as error:
        text = f"the name {name} does not resolve ({error.strerror or error})"
        fix = f"put {name} into /etc/hosts or DNS, or export GLOO_SOCKET_IFNAME=<interface>"
        given = any(os.environ.get(variable) for variable in _NETWORK_GIVEN)
        return [(warning if given else bad)("host name", text, fix)]
    return [ok("host name", f"{name} is {', '.join(addresses)}")]


def memory_findings(need: float) -> list[Finding]:
    """Check free memory of the node and of this job's control group."""
    free, whole = host_memory()
    text = f"{free / GB:.1f} of {whole / GB:.1f} GB are free"
    if free < need * GB:
        fix = "end what holds memory here, ask the scheduler for more, or use another node"
        return [bad("memory", f"{text}; {need:g} are needed", fix)]
    if free < _LITTLE_MEMORY * GB:
        return [warning("memory", text, "end what holds memory here")]
    return [ok("memory", text)]
