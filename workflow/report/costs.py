"""Time and cost of a run's stages, for its report."""

from core.files.atomic import Json
from planning.estimate.hardware import hardware_of

CORE_DOLLARS = 0.05
"""Dollars a CPU core and hour, on demand, as planning/data_jobs.py counts (2 cores: 0.1)."""
GPU = "h100"
_HOUR = 3600


def costs_of(summary: Json) -> Json:
    """Rows (stage, seconds, share, core_hours, gpu_hours) and totals with dollars.

    summary["resources"] has `nodes`, `gpus` and `cpus` of a submitted run's stages; a stage without
    them used the machine's summary["cores"].
    """
    total = sum(summary["seconds"].values())
    rows = []
    for stage, seconds in summary["seconds"].items():
        used = summary.get("resources", {}).get(stage, {})
        nodes = used.get("nodes", 1) * used.get("workers", 1)
        cores = nodes * used.get("cpus", summary.get("cores", 1))
        rows.append(
            {
                "stage": stage,
                "seconds": seconds,
                "share": seconds / total if total else 0.0,
                "core_hours": cores * seconds / _HOUR,
                "gpu_hours": nodes * used.get("gpus", 0) * seconds / _HOUR,
            }
        )
    cores, gpus = (sum(row[name] for row in rows) for name in ("core_hours", "gpu_hours"))
    dollars = hardware_of(GPU).cost_per_hour if gpus else CORE_DOLLARS
    return {
        "rows": rows,
        "seconds": total,
        "core_hours": cores,
        "gpu_hours": gpus,
        "dollars": dollars * (gpus or cores),
        "price": f"${dollars:g} {'an H100' if gpus else 'a core'} and hour",
    }
