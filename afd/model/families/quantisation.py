"""How a checkpoint's matrices are stored, from its configuration: plain, in block-scaled float8, or refused by name."""

from __future__ import annotations

from afd.errors import ModelError
from afd.model.families.config_reader import ConfigReader, shown

DEFAULT_BLOCK = (128, 128)
"""Rows and columns that share a scale in block-scaled float8 checkpoints."""

WHAT_LOADS = "what loads: bfloat16, float16 or float32 weights, or float8 in blocks with weight_scale_inv"

_NO_PART = frozenset(
    ("activation_scheme", "fmt", "modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize")
)
"""Keys of float8 settings that need not be read: activations stay in the compute dtype, and the files say which
matrices are float8."""


def fp8_block(config: ConfigReader) -> tuple[int, int]:
    """Rows and columns that share a scale in a float8 checkpoint; any other quantisation is refused."""
    for key in ("compression_config", "quantization"):
        if config.get(key):
            raise _refused(config, key, _method(config.get(key)))
    settings = config.get("quantization_config")
    if settings is None:
        return DEFAULT_BLOCK
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        raise _refused(config, "quantization_config", _method(settings))
    inner = ConfigReader(settings, f"{config.where}: quantization_config")
    inner.get("quant_method")
    block = settings["weight_block_size"] if "weight_block_size" in settings else list(DEFAULT_BLOCK)
    inner.get("weight_block_size")
    if block is None:
        raise _refused(
            config, "quantization_config", "float8 with one scale for a tensor or row (no weight_block_size)"
        )
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise inner.fail("weight_block_size", f"{shown(block)} is not two positive integers")
    sizes = (
        ConfigReader({"weight_block_size": block[0]}, inner.where),
        ConfigReader({"weight_block_size": block[1]}, inner.where),
    )
    inner.refuse_rest(_NO_PART, "float8 in blocks")
    return sizes[0].integer("weight_block_size"), sizes[1].integer("weight_block_size")


def refuse_quant_file(quant: ConfigReader) -> None:
    """Refuse what hf_quant_config.json (ModelOpt) says about weights."""
    settings = quant.section("quantization")
    algorithm = settings.get("quant_algo") if settings is not None else None
    if algorithm is not None:
        raise ModelError(f"{quant.where}: weights in {shown(algorithm)} (ModelOpt) are not supported; {WHAT_LOADS}")


def _refused(config: ConfigReader, key: str, what: str) -> ModelError:
    return config.fail(key, f"{what} is not supported; {WHAT_LOADS}")


def _method(settings: object) -> str:
    """The name of a quantisation as well as its settings tell it."""
    if not isinstance(settings, dict):
        return f"quantisation {shown(settings)}"
    method = settings.get("quant_method")
    if method is None and "bits" in settings and "group_size" in settings:
        return f"MLX quantisation, {shown(settings['bits'])} bits in groups of {shown(settings['group_size'])},"
    if method is None and "quant_algo" in settings:
        method = "modelopt"
    kind = settings.get("format") or settings.get("quant_algo")
    return f"quant_method {shown(method)}" + (f" ({shown(kind)})" if kind else "")
