"""What a family declares: which configurations are its own, how to read them, what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from afd.model.families.config_reader import ConfigReader
from afd.model.families.known_keys import refuse_unknown, refuse_unknown_gguf
from afd.model.inventory import TensorSpec
from afd.model.spec import ModelSpec

EXPERT_FIELD = "{expert}"
STACKED = ("expert_gate", "expert_up")


@dataclass(frozen=True, slots=True)
class Naming:
    """Where a checkpoint layout keeps each part.

    names: part -> stored name, with {layer} where it has one; with {expert} where the experts of a packed part are
    stored one by one.
    Where the parts of STACKED have one name, they are stacked along their rows.
    alternatives: names of some parts in other layouts, each taken when the checkpoint has its tensors.
    aliases: (pattern, replacement) pairs that turn other published spellings into the names above.
    ignored: stored names (whole-match patterns) that belong to the layout and are not needed for serving text.
    layer_prefix: of layers beyond the model's own (multi-token prediction heads), which are ignored; "" = none exist.
    interleaved_rope_rows: q and k rows are stored in (2i, 2i+1) order and are put back when loaded (llama.cpp).
    """

    names: Mapping[str, str]
    alternatives: tuple[Mapping[str, str], ...] = ()
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

    def stack_of(self, part: str) -> tuple[int, int]:
        """(place, number) of a part among the parts that are stacked under one name; (0, 1) when it has its own."""
        if part not in STACKED or len({self.names[other] for other in STACKED}) > 1:
            return 0, 1
        return STACKED.index(part), len(STACKED)

    def for_names(self, stored: Container[str], num_layers: int) -> Naming:
        """This layout, with the alternatives that `stored` (canonical names) has."""
        names = dict(self.names)
        for alternative in self.alternatives:
            templates = set(alternative.values())
            if any(t.format(layer=i, expert=0) in stored for i in range(num_layers) for t in templates):
                names |= alternative
        return replace(self, names=names, alternatives=())


@dataclass(frozen=True, slots=True)
class Family:
    """model_types, architectures: of config.json.
    read: (configuration, model name) -> spec.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    read: Callable[[ConfigReader, str], ModelSpec]
    naming: Naming
    read_gguf: Callable[[ConfigReader, str], ModelSpec] | None = None
    gguf_naming: Naming | None = None

    def parse(self, config: ConfigReader, name: str) -> ModelSpec:
        """The spec of a config.json; ModelError for a key that is wrong, or that is set and not known to the family."""
        spec = self.read(config, name)
        refuse_unknown(config, self.name)
        return spec

    def parse_gguf(self, metadata: ConfigReader, name: str) -> ModelSpec:
        """The same of GGUF metadata."""
        assert self.read_gguf is not None, "chosen for a GGUF file"
        spec = self.read_gguf(metadata, name)
        refuse_unknown_gguf(metadata, self.name)
        return spec
