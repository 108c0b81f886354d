"""How tensors get to the memory of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; itself where it is there already.

    A copy to a GPU goes through pinned memory behind what the current CUDA stream has queued, and nobody waits for it:
    the caller may change or drop `tensor` at once.
    """
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
