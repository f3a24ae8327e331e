"""These tests are collected only where torch is built for CUDA; none needs a GPU."""

import torch

collect_ignore_glob = [] if torch.version.cuda else ["test_*.py"]
