"""The paged KV cache's memory: one K and one V tensor per layer. Which block is whose is the block pool's business."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd.host.memory import zeroed


class KVLayer(Protocol):
    """What the cache needs to know of one attention layer."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def cached_k_dim(self) -> int: ...
    @property
    def cached_v_dim(self) -> int: ...
    @property
    def window(self) -> int: ...


class KVModel(Protocol):
    """What the cache needs to know of a model; a ModelSpec is one."""

    @property
    def attention_layers(self) -> Sequence[KVLayer]: ...


class KVCache:
    """num_window_blocks: of sliding-window layers, where they have a pool of their own; None = num_blocks.

    k[layer], v[layer]: [num_blocks, num_kv_heads, block_size, width], contiguous; v's width is 0 for MLA.
    spare_block: one more of each layer, which no pool gives away, for rows that are computed and not meant.
    spare_slots: the first slot of it, in layers without and with a window.

    A token's slot is block * block_size + offset. Zeroed at start: kernels may read (and mask) a block's unwritten
    slots, and uninitialised memory could hold NaN, which a mask by multiplication would spread.
    """

    def __init__(
        self,
        spec: KVModel,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
        num_window_blocks: int | None = None,
        spare_block: bool = False,
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        window_blocks = num_blocks if num_window_blocks is None else num_window_blocks
        self.spare_slots = num_blocks * block_size, window_blocks * block_size
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for layer in spec.attention_layers:
            for tensors, width in ((self.k, layer.cached_k_dim), (self.v, layer.cached_v_dim)):
                count = window_blocks if layer.window else num_blocks
                shape = (count + spare_block, layer.num_kv_heads, block_size, width)
                tensors.append(_zeros(shape, dtype, device))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.k + self.v)

    def close(self) -> None:
        """Give the memory back; the cache cannot be used afterwards."""
        self.k.clear()
        self.v.clear()


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """full: blocks of all layers, or of those without a window.
    windowed: of sliding-window layers; 0 = none apart.
    """

    full: int
    windowed: int = 0


def count_blocks(
    spec: KVModel, num_bytes: int, block_size: int, dtype: torch.dtype, most_windowed: int = 0, num_full: int = 0
) -> BlockCounts:
    """How many blocks fit into `num_bytes`.

    most_windowed: the windowed blocks with which no sequence ever lacks one. If there is not room for so many, both
    kinds of layer get the same number.
    num_full: the count of blocks, whatever `num_bytes` is; 0 = what fits.
    """
    full, windowed = (
        block_size * dtype.itemsize * sum(_elements(a) for a in spec.attention_layers if bool(a.window) is kind)
        for kind in (False, True)
    )
    if windowed == 0 or full == 0:
        return BlockCounts(num_full or num_bytes // (full + windowed))
    even = num_full or num_bytes // (full + windowed)
    if num_full or even <= most_windowed:
        return BlockCounts(even, min(even, most_windowed))
    return BlockCounts((num_bytes - most_windowed * windowed) // full, most_windowed)


def too_small_for_context(num_tokens: int, max_context: int, gib: float) -> str:
    """What a KV cache of `num_tokens` means for users, and what to set.

    gib: its size; 0 = given in blocks.
    """
    text = (
        f"a request can have {num_tokens} tokens, prompt and answer together: the KV cache holds no more, "
        f"the model's context is {max_context}"
    )
    if gib:
        enough = math.ceil(100 * gib * max_context / num_tokens) / 100
        return f"{text}; --kv-cache-gib {enough:g} instead of {gib:g} holds all of it"
    return f"{text}; more blocks (attention.num_blocks) hold more of it"


def _elements(layer: KVLayer) -> int:
    """Numbers that the cache holds of one token in one layer."""
    return layer.num_kv_heads * (layer.cached_k_dim + layer.cached_v_dim)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros; on the CPU start-up does not pay for them."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeroed(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
