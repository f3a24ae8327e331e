"""These tests are collected only where CUDA is."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
