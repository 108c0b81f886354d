"""RMSNorm, in float32 whatever the activation dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [num_tokens, width] -> the same shape and dtype.  weight [width] float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)
