"""What a family declares: which configurations are its own, how to read them, what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from afd.model.families.config_reader import ConfigReader
from afd.model.inventory import TensorSpec
from afd.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Naming:
    """Where a checkpoint layout keeps each part.

    names: part -> stored name, with {layer} where it has one.
    ignored: stored names (whole-match patterns) that belong to the layout and are not needed for serving text.
    interleaved_rope_rows: q and k rows are stored in (2i, 2i+1) order and are put back when loaded (llama.cpp).
    """

    names: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    interleaved_rope_rows: bool = False

    def stored_name(self, tensor: TensorSpec) -> str:
        return self.names[tensor.part].format(layer=tensor.layer)

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


@dataclass(frozen=True, slots=True)
class Family:
    """model_types, architectures: of config.json.  parse: (configuration, model name) -> spec."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    parse: Callable[[ConfigReader, str], ModelSpec]
    naming: Naming
    gguf_parse: Callable[[ConfigReader, str], ModelSpec] | None = None
    gguf_naming: Naming | None = None
