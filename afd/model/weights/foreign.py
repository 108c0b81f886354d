"""Names the quantised layouts of other programs, so that a checkpoint of theirs is refused as what it is."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from afd.model.weights.source import StoredTensor

_BY_SUFFIX = (
    (".weight_packed", "packed integers or FP4 (compressed-tensors)"),
    (".g_idx", "packed integers (GPTQ)"),
    (".qweight", "packed integers (AWQ or GPTQ)"),
    (".weight_scale_2", "NVFP4 (ModelOpt)"),
    (".quant_state.bitsandbytes__nf4", "NF4 (bitsandbytes)"),
    (".quant_state.bitsandbytes__fp4", "FP4 (bitsandbytes)"),
    (".SCB", "int8 (bitsandbytes)"),
    ("_blocks", "MXFP4 blocks"),
)


def foreign_layout(tensors: Mapping[str, StoredTensor]) -> str | None:
    """What the names and types of a checkpoint's tensors say about its quantisation; None where they say nothing."""
    for suffix, layout in _BY_SUFFIX:
        if any(name.endswith(suffix) for name in tensors):
            return layout
    for name, tensor in tensors.items():
        scale = tensors.get(name + "_scale")
        if scale is not None and tensor.dtype.startswith("F8"):
            return f"float8 with one scale for {_each(scale)}"
        if scale is not None and tensor.dtype == "I8":
            return f"int8 with one scale for {_each(scale)}"
        if name.endswith(".weight") and tensor.dtype == "U32" and name.removesuffix("weight") + "scales" in tensors:
            return "packed integers (MLX)"
    return None


def _each(scale: StoredTensor) -> str:
    return "each tensor" if prod(scale.shape) == 1 else "each row"
