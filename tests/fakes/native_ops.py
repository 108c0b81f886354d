"""What tests of native code run on, where this machine has it."""

from __future__ import annotations

from afd.ops.cpu.ops import CpuOps
from afd.ops.select import select


def native_ops() -> CpuOps | None:
    """The ops of bfloat16 models if they pack weights and compute whole layers in one call; else None."""
    ops = select("cpu", "bfloat16")
    return ops if isinstance(ops, CpuOps) and ops.kernels.vectorised else None
