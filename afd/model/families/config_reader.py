"""Typed, named access to a model's configuration: every error says which file and which key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afd.errors import ModelError
from afd.model.spec import RopeScaling

DEFAULT_BLOCK = (128, 128)
"""Rows and columns that share a scale in block-scaled float8 checkpoints."""


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """values: config.json's object, or GGUF metadata.  where: the file, for messages."""

    values: Mapping[str, Any]
    where: str

    def fail(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.where}: {key}: {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is set, as a positive integer."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self.fail(key, f"expected a positive integer, found {value!r}")
            return value
        if default is None:
            raise self.fail(keys[0], "missing")
        return default

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"expected a number, found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"expected true or false, found {value!r}")
        return value

    def token_id(self, key: str) -> int | None:
        ids = self.token_ids(key)
        return ids[0] if ids else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(key, f"expected token ids, found {value!r}")
        return tuple(ids)

    def dtype(self) -> str:
        name = str(self.values.get("torch_dtype") or self.values.get("dtype") or "bfloat16")
        return name.removeprefix("torch.")

    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns that share a scale in a float8 checkpoint; any other quantisation is refused."""
        settings = self.values.get("quantization_config")
        if settings is None:
            return DEFAULT_BLOCK
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        if method != "fp8":
            raise self.fail("quantization_config", f"quant_method {method!r} is not supported (known: fp8)")
        block = settings.get("weight_block_size") or DEFAULT_BLOCK
        if len(block) != 2 or any(not isinstance(size, int) or size < 1 for size in block):
            raise self.fail("quantization_config", f"weight_block_size {block!r} is not two positive integers")
        return int(block[0]), int(block[1])

    def refuse(self, key: str, *, unless: object = None) -> None:
        """A setting that changes the forward pass and that AFD does not have: an error, never ignored."""
        value = self.values.get(key)
        if value is not None and value != unless:
            raise self.fail(key, f"{value!r} is not supported for this family")

    def rope(self, default_theta: float) -> tuple[float, RopeScaling | None]:
        """(theta, scaling) from either layout: rope_theta + rope_scaling, or one rope_parameters object."""
        parameters = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(parameters, Mapping):
            raise self.fail("rope_scaling", f"expected an object, found {parameters!r}")
        inner = ConfigReader(parameters, f"{self.where}: rope_scaling")
        theta = inner.number("rope_theta", self.number("rope_theta", default_theta))
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, RopeScaling("linear", inner.number("factor"))
        if kind == "llama3":
            return theta, RopeScaling(
                "llama3",
                factor=inner.number("factor"),
                low_freq_factor=inner.number("low_freq_factor"),
                high_freq_factor=inner.number("high_freq_factor"),
                original_max_position=inner.integer("original_max_position_embeddings"),
            )
        if kind == "yarn":
            return theta, self._yarn(inner)
        raise self.fail("rope_scaling", f"type {kind!r} is not supported (known: default, linear, llama3, yarn)")

    def _yarn(self, inner: ConfigReader) -> RopeScaling:
        original = inner.integer("original_max_position_embeddings")
        factor = inner.number("factor", self.integer("max_position_embeddings", default=original) / original)
        mscale, mscale_all = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)
        attention_factor = yarn_mscale(factor, 1.0)
        if mscale and mscale_all:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=inner.number("beta_fast", 32.0),
            beta_slow=inner.number("beta_slow", 1.0),
            attention_factor=inner.number("attention_factor", attention_factor),
            truncate=inner.flag("truncate", True),
        )

    def per_layer(self, key: str, num_layers: int) -> list[Any] | None:
        """A list with one entry for each layer (and perhaps more, for layers that are not the model's own), or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) < num_layers:
            raise self.fail(key, f"expected a list with an entry for each of {num_layers} layers, found {value!r}")
        return list(value[:num_layers])

    def layer_set(self, key: str, num_layers: int, num_beyond: int = 0) -> frozenset[int] | None:
        """Layer numbers, "4,5,6" or a list; None when absent. num_beyond: further layers that may be named."""
        value = self.values.get(key)
        if value is None:
            return None
        items = [i for i in value.strip().split(",") if i.strip()] if isinstance(value, str) else value
        try:
            layers = frozenset(int(item) for item in items)
        except (TypeError, ValueError):
            raise self.fail(key, f"expected layer numbers, found {value!r}") from None
        for layer in sorted(layers):
            if not 0 <= layer < num_layers + num_beyond:
                raise self.fail(key, f"names layer {layer}, but the model has layers 0 to {num_layers - 1}")
        return layers


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, equation 22, with DeepSeek's multiplier)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
