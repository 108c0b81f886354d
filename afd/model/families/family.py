"""What a family declares: which configurations are its own, how to read them, what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from afd.model.families.config_reader import ConfigReader
from afd.model.inventory import TensorSpec
from afd.model.spec import ModelSpec

EXPERT_FIELD = "{expert}"


@dataclass(frozen=True, slots=True)
class Naming:
    """Where a checkpoint layout keeps each part.

    names: part -> stored name, with {layer} where it has one; with {expert} where the experts of a packed part are
    stored one by one.
    per_expert: the names of packed parts in a second layout, taken when the checkpoint has those tensors.
    aliases: (pattern, replacement) pairs that turn other published spellings into the names above.
    ignored: stored names (whole-match patterns) that belong to the layout and are not needed for serving text.
    layer_prefix: of layers beyond the model's own (multi-token prediction heads), which are ignored; "" = none exist.
    interleaved_rope_rows: q and k rows are stored in (2i, 2i+1) order and are put back when loaded (llama.cpp).
    """

    names: Mapping[str, str]
    per_expert: Mapping[str, str] | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    layer_prefix: str = ""
    interleaved_rope_rows: bool = False

    def is_per_expert(self, part: str) -> bool:
        return EXPERT_FIELD in self.names[part]

    def stored_name(self, tensor: TensorSpec, expert: int = 0) -> str:
        """expert: counts only for parts that are stored expert by expert."""
        return self.names[tensor.part].format(layer=tensor.layer, expert=expert)

    def canonical(self, name: str) -> str:
        """A stored name in this layout's own spelling."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str, num_layers: int) -> bool:
        """name: in canonical spelling."""
        if any(re.fullmatch(pattern, name) for pattern in self.ignored):
            return True
        match = re.match(rf"{re.escape(self.layer_prefix)}(\d+)\.", name) if self.layer_prefix else None
        return match is not None and int(match[1]) >= num_layers

    def for_names(self, stored: Iterable[str]) -> Naming:
        """This layout, or its per-expert form where that is what is stored (canonical names)."""
        if self.per_expert is None:
            return self
        pattern = re.compile(
            "|".join(
                re.escape(template).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
                for template in self.per_expert.values()
            )
        )
        if any(pattern.fullmatch(name) for name in stored):
            return replace(self, names={**self.names, **self.per_expert}, per_expert=None)
        return self


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
