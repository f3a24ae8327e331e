"""`tapir serve` as a process, called as its users call it."""
