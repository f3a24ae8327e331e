"""Tests that need a CUDA build of torch, with or without a GPU; run by `make py312`."""
