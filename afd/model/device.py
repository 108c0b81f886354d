"""Which device a half computes on, and how tensors get there. What a GPU's worker needs beyond: `afd.model.cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.errors import ConfigError


def check_device(device: str, key: str) -> None:
    """ConfigError when `device` cannot be used here. key: the configuration key that asked for it."""
    if device == "cuda" and not torch.cuda.is_available():
        built = "this torch build has no CUDA support" if torch.version.cuda is None else "torch finds no usable GPU"
        raise ConfigError(f"{key} = 'cuda', but {built} (torch {torch.__version__}); use 'cpu'")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; itself where it is there already.

    A copy to a GPU goes through pinned memory behind what the current CUDA stream has queued, and nobody waits for it:
    the caller may change or drop `tensor` at once.
    """
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
