"""How far a clock may be off."""

from cluster.doctor.finding import Finding, bad, ok, warning

NOTED = 2.0
"""Seconds; a machine that asks a time server is off by milliseconds."""
WRONG = 30.0
"""Seconds. Munge refuses 300, S3 refuses 900."""
_FIX = "set the clock of that machine: chronyc makestep, or systemctl restart chronyd"


def clock_finding(offset: float, whose: str) -> Finding:
    """A row for a clock that is `offset` seconds ahead of somebody's."""
    direction = "ahead of" if offset > 0 else "behind"
    found = f"the clock is {abs(offset):.1f} s {direction} {whose}"
    if abs(offset) > WRONG:
        return bad("clock", found, _FIX)
    if abs(offset) > NOTED:
        return warning("clock", found, _FIX)
    return ok("clock", found)
