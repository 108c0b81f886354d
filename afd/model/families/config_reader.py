"""Typed, named access to a model's configuration: every error says which file and which key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afd.errors import ModelError
from afd.model.spec import RopeScaling


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
        raise self.fail("rope_scaling", f"type {kind!r} is not supported (known: default, linear, llama3)")
