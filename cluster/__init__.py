"""Processes and jobs: the launcher of ranks; imports core only, never torch."""
