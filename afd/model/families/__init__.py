"""Registry of model families: one small file each. To add one, write its file and name it in FAMILIES."""

from __future__ import annotations

from afd.errors import ModelError
from afd.model.families import llama, step3
from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming

FAMILIES: tuple[Family, ...] = (llama.FAMILY, step3.FAMILY)

__all__ = ["FAMILIES", "ConfigReader", "Family", "Naming", "family_of_config", "family_of_gguf"]


def family_of_config(config: ConfigReader) -> Family:
    """The family of a config.json, by model_type, else by architecture; ModelError names what is known."""
    model_type = config.values.get("model_type")
    architectures = config.values.get("architectures") or []
    for family in FAMILIES:
        if model_type in family.model_types or any(a in family.architectures for a in architectures):
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise ModelError(
        f"{config.where}: unknown architecture: model_type {model_type!r}, architectures {architectures!r} "
        f"(known model types: {known})"
    )


def family_of_gguf(metadata: ConfigReader) -> Family:
    """The family of a GGUF file, by general.architecture."""
    architecture = metadata.values.get("general.architecture")
    known = [family for family in FAMILIES if family.gguf_naming is not None]
    for family in known:
        if architecture == family.name:
            return family
    names = ", ".join(family.name for family in known)
    raise ModelError(f"{metadata.where}: unknown architecture {architecture!r} (known in GGUF files: {names})")
