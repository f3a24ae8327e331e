"""One protocol, three engines; only this package imports deepspeed."""
