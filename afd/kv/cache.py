"""The paged KV cache's memory: one K and one V tensor per layer. Which block is whose is the block pool's business."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class KVLayer(Protocol):
    """What the cache needs to know of one attention layer."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def cached_k_dim(self) -> int: ...
    @property
    def cached_v_dim(self) -> int: ...


class KVModel(Protocol):
    """What the cache needs to know of a model; a ModelSpec is one."""

    @property
    def attention_layers(self) -> Sequence[KVLayer]: ...


class KVCache:
    """k[layer], v[layer]: [num_blocks, num_kv_heads, block_size, width], contiguous; v's width is 0 for MLA.

    A token's slot is block * block_size + offset. Zeroed at start: kernels may read (and mask) a block's unwritten
    slots, and uninitialised memory could hold NaN, which a mask by multiplication would spread.
    """

    def __init__(self, spec: KVModel, num_blocks: int, block_size: int, dtype: torch.dtype, device: str = "cpu"):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for layer in spec.attention_layers:
            for tensors, width in ((self.k, layer.cached_k_dim), (self.v, layer.cached_v_dim)):
                shape = (num_blocks, layer.num_kv_heads, block_size, width)
                tensors.append(_zeros(shape, dtype, device))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.k + self.v)

    def close(self) -> None:
        """Give the memory back; the cache cannot be used afterwards."""
        self.k.clear()
        self.v.clear()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros; on the CPU from memory that the kernel zeroes when it is first touched, so that start-up pays nothing."""
    if device != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def num_blocks_for_bytes(spec: KVModel, num_bytes: int, block_size: int, dtype: torch.dtype) -> int:
    """How many blocks (of all layers together) fit into `num_bytes`."""
    elements = sum(a.num_kv_heads * (a.cached_k_dim + a.cached_v_dim) for a in spec.attention_layers)
    return num_bytes // (elements * block_size * dtype.itemsize)
