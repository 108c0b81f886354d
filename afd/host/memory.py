"""Memory for weights and KV on the CPU: large pieces, in pages of 2 MiB where Linux has them (`madvise`).

Every step reads all weights and much of the KV. With pages of 4 KiB each 64 lines of that begin with a walk of the page
tables, twice as long in a virtual machine, which prefetches must wait for, too (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from stepmesh.layout import align

PIECE_BYTES = 64 << 20
ALIGNMENT = 64  # a cache line, a vector
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the memory limit of control groups, version 2 and 1, as a container sees its own."""


def zeroed(num_bytes: int) -> Tensor:
    """Zeros [num_bytes] uint8, which the kernel makes when they are first touched, and takes back with the tensor."""
    if num_bytes == 0:
        return torch.zeros(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def limit_bytes() -> int:
    """What processes of this host or container may hold together: the machine's memory, or its cgroup's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


class HostMemory:
    """Tensors cut out of pieces of PIECE_BYTES; a piece lives as long as one of its tensors."""

    def __init__(self) -> None:
        self._rest = zeroed(0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled, aligned to ALIGNMENT."""
        num_bytes = prod(shape) * dtype.itemsize
        taken = align(num_bytes, ALIGNMENT)
        piece = self._rest if taken <= self._rest.shape[0] else zeroed(max(taken, PIECE_BYTES))
        if piece is self._rest or piece.shape[0] - taken > self._rest.shape[0]:
            self._rest = piece[taken:]
        return piece[:num_bytes].view(dtype).view(*shape)
