"""Replaces NVML where there is no driver, since torch would ask CUDA instead. Preloaded first."""

import torch

if torch.cuda._device_count_nvml() < 0:
    torch.cuda._raw_device_count_nvml = lambda: 1
