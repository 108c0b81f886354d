"""How wide the weights of a Hugging Face checkpoint are: its quantization_config, else its dtype."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from afd.errors import ConfigError
from afd.plan.weights import BYTES_OF, WeightBytes

_DTYPES = {"bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float32": 4.0, "float8_e4m3fn": 1.0}
_SCALE_BYTES = 2  # of a group of integers
_SPARED = {
    "linear": re.compile(r"attn|attention"),
    "shared": re.compile(r"shared_expert"),
    "routed": re.compile(r"(?<!shared_)experts(?!\w*gate)"),
}


def weight_bytes_of(config: Mapping[str, Any], where: str) -> WeightBytes:
    """Bytes a weight takes, by part; 8-bit where the config says nothing. ConfigError on a method that is not known."""
    quantised = config.get("quantization_config") or config.get("compression_config")
    own = _DTYPES.get(str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch."))
    if not isinstance(quantised, Mapping):
        return WeightBytes.all(1.0 if own is None else own)
    width, spared = _width(quantised, where), _spared(quantised)
    plain = 2.0 if own is None else own
    parts = {part: plain if part in spared else width for part in ("linear", "shared", "routed")}
    return WeightBytes(**parts)


def _width(quantised: Mapping[str, Any], where: str) -> float:
    method = str(quantised.get("quant_method") or quantised.get("quant_algo") or "").lower().replace("_", "-")
    if method in ("fp8", "fbgemm-fp8", "ptpc-fp8"):
        return 1.0
    if method == "mxfp4":
        return BYTES_OF["mxfp4"]
    if method in ("awq", "gptq", "gptq-marlin", "awq-marlin", "auto-round"):
        return _grouped(quantised.get("bits") or quantised.get("w_bit"), quantised.get("group_size"), where)
    if method == "bitsandbytes":
        return BYTES_OF["nf4"] if quantised.get("load_in_4bit") else 1.0
    if method == "compressed-tensors":
        groups = quantised.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, Mapping) else []
        widths = [_scheme(scheme.get("weights") or {}, where) for scheme in schemes if isinstance(scheme, Mapping)]
        if widths:
            return max(widths)
    if method.startswith("modelopt"):
        inner = quantised.get("quantization")
        algorithm = str((inner if isinstance(inner, Mapping) else quantised).get("quant_algo") or "").upper()
        if "NVFP4" in algorithm:
            return BYTES_OF["nvfp4"]
        if "W4" in algorithm:
            return BYTES_OF["int4"]
        if "FP8" in algorithm:
            return 1.0
    raise ConfigError(
        f"{where}: quantization_config with quant_method {method or 'unnamed'!r} is not known to the planner: "
        f"give the width with --weight-dtype ({', '.join(BYTES_OF)})"
    )


def _scheme(weights: Mapping[str, Any], where: str) -> float:
    bits, kind = weights.get("num_bits"), weights.get("type")
    if kind == "float" and bits == 4:
        return BYTES_OF["mxfp4" if weights.get("group_size") == 32 else "nvfp4"]
    if kind == "float" or bits == 8:
        return 1.0
    return _grouped(bits, weights.get("group_size"), where)


def _grouped(bits: object, group_size: object, where: str) -> float:
    """Packed integers and one 16-bit scale a group; a group size of -1 is a whole row."""
    if not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ConfigError(f"{where}: quantization_config needs a number of bits from 1 to 16, found {bits!r}")
    group = group_size if isinstance(group_size, int) and group_size > 0 else 0
    return bits / 8 + (_SCALE_BYTES / group if group else 0.0)


def _spared(quantised: Mapping[str, Any]) -> set[str]:
    """Parts that stay as they are: named in the list of modules that are not converted."""
    inner = quantised.get("quantization")
    lists = [
        source.get(key)
        for source in (quantised, inner if isinstance(inner, Mapping) else {})
        for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
    ]
    names = [
        str(name) for found in lists if isinstance(found, Sequence) and not isinstance(found, str) for name in found
    ]
    return {part for part, pattern in _SPARED.items() if any(pattern.search(name) for name in names)}
