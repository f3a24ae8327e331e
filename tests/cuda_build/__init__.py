"""What only a CUDA build of torch shows, with or without a GPU; run by `make py312`."""
