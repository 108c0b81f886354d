"""Which device a worker computes on; refused with the reason where it is not there."""

from __future__ import annotations

import torch

from afd.errors import ConfigError


def check_device(device: str, key: str) -> None:
    """ConfigError when `device` cannot be used here. key: the configuration key that asked for it."""
    if device == "cuda" and not torch.cuda.is_available():
        built = "this torch build has no CUDA support" if torch.version.cuda is None else "torch finds no usable GPU"
        raise ConfigError(f"{key} = 'cuda', but {built} (torch {torch.__version__}); use 'cpu'")
