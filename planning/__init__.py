"""The floor of dry runs: what a run will need, before it is paid for."""
