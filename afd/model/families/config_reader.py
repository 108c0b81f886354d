"""Typed, named access to a model's configuration: every error says which file and which key.

A reader remembers which keys were asked for, so that what nobody asked for can be refused in the end: a key that AFD
does not know might change the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from afd.errors import ModelError

MAX_SIZE = 1 << 24
"""The largest width, count or context that a configuration may claim."""

MAX_LAYERS = 1_000
MAX_EXPERTS = 10_000
_MAX_SHOWN = 80


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """values: config.json's object, or GGUF metadata.
    where: the file, for messages.
    asked: keys read so far.
    """

    values: Mapping[str, Any]
    where: str
    asked: set[str] = field(default_factory=set, compare=False, repr=False)

    def fail(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.where}: {key if key.isprintable() else repr(key)}: {problem}")

    def get(self, key: str) -> Any:
        """The value as it stands; None when absent."""
        self.asked.add(key)
        return self.values.get(key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def section(self, key: str) -> ConfigReader | None:
        """A reader of the object under `key`; None when absent, null or empty."""
        value = self.get(key)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(key, f"expected an object, found {shown(value)}")
        return ConfigReader(value, f"{self.where}: {key}")

    def integer(self, *keys: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer from `least` to `most` under any of `keys`, which are names for the same: those set must agree."""
        found = [(key, value) for key in keys if (value := self.get(key)) is not None]
        for key, value in found:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                kind = "a positive integer" if least == 1 else f"an integer from {least}"
                raise self.fail(key, f"expected {kind}, found {shown(value)}")
            if value > most:
                raise self.fail(key, f"{shown(value)} is more than {most}, the most that is believed")
            if value != found[0][1]:
                raise self.fail(key, f"{value} contradicts {found[0][0]}, {found[0][1]}")
        if found:
            return int(found[0][1])
        if default is None:
            raise self.fail(keys[0], "missing")
        return default

    def layers(self, key: str = "num_hidden_layers") -> int:
        return self.integer(key, most=MAX_LAYERS)

    def experts(self, *keys: str) -> int:
        return self.integer(*keys, most=MAX_EXPERTS)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"expected a number, found {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.fail(key, f"expected a finite number, found {shown(value)}")
        return number

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        number = self.number(key, default)
        if number <= 0.0:
            raise self.fail(key, f"expected a number above 0, found {shown(number)}")
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"expected true or false, found {shown(value)}")
        return value

    def token_id(self, key: str) -> int | None:
        ids = self.token_ids(key)
        return ids[0] if ids else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing; converters write -1 for "none"."""
        value = self.get(key)
        if value is None:
            return ()
        ids = [i for i in (value if isinstance(value, list | tuple) else [value]) if i != -1]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(key, f"expected token ids, found {shown(value)}")
        return tuple(ids)

    def dtype(self) -> str:
        name = str(self.get("torch_dtype") or self.get("dtype") or "bfloat16")
        return name.removeprefix("torch.")

    def refuse(self, key: str, *, unless: object = None) -> None:
        """A setting that changes the forward pass and that AFD does not have: an error, never ignored."""
        value = self.get(key)
        if value is not None and value != unless:
            raise self.fail(key, f"{shown(value)} is not supported for this family")

    def refuse_rest(self, known: Collection[str], reader: str) -> None:
        """Refuse every key that is set, was not asked for and is not among `known`, which have no part in the numbers.

        reader: who reads, for the message.
        """
        for key, value in self.values.items():
            if value is not None and key not in self.asked and key not in known:
                raise self.fail(
                    key,
                    f"{shown(value)} is not known to {reader}, so it might change the model's numbers; "
                    "if it does not, remove it from the file",
                )

    def per_layer(self, key: str, num_layers: int) -> list[Any] | None:
        """A list with one entry for each layer (and perhaps more, for layers that are not the model's own), or None."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) < num_layers:
            raise self.fail(key, f"expected a list with an entry for each of {num_layers} layers, found {shown(value)}")
        return list(value[:num_layers])

    def layer_set(self, key: str, num_layers: int, num_beyond: int = 0) -> frozenset[int] | None:
        """Layer numbers, "4,5,6" or a list; None when absent. num_beyond: further layers that may be named."""
        value = self.get(key)
        if value is None:
            return None
        items = [i for i in value.strip().split(",") if i.strip()] if isinstance(value, str) else value
        try:
            layers = frozenset(int(item) for item in items)
        except (TypeError, ValueError, OverflowError):
            raise self.fail(key, f"expected layer numbers, found {shown(value)}") from None
        for layer in sorted(layers):
            if not 0 <= layer < num_layers + num_beyond:
                raise self.fail(key, f"names layer {shown(layer)}, but the model has layers 0 to {num_layers - 1}")
        return layers


def shown(value: object) -> str:
    """A value of a file as it may stand in a message: on one line, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**_MAX_SHOWN:
        return "a number of more than 80 digits"
    if isinstance(value, str | list | tuple):
        value = value[:_MAX_SHOWN]
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
