"""Registry of model families: one small file each. To add one, write its file and name it in FAMILIES."""

from __future__ import annotations

from dataclasses import replace

from afd.errors import ModelError
from afd.model.families import deepseek, ernie, llama, qwen, step3, step3p5
from afd.model.families.config_reader import ConfigReader, shown
from afd.model.families.family import Family, Naming
from afd.model.families.vision_language import as_text_family, text_config, with_base_names

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    step3.FAMILY,
    step3p5.FAMILY,
    deepseek.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    ernie.FAMILY,
)

__all__ = ["FAMILIES", "ConfigReader", "Family", "Naming", "family_of_config", "family_of_gguf", "text_config"]


def family_of_config(config: ConfigReader) -> Family:
    """The family of a config.json, by model_type, else by architecture; ModelError names what is known."""
    inner = text_config(config)
    model_type, architectures = _identity(config if inner is None else inner)
    for family in FAMILIES:
        if model_type in family.model_types or any(a in family.architectures for a in architectures):
            chosen = family if inner is None else as_text_family(family)
            return replace(chosen, naming=with_base_names(chosen.naming))
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise ModelError(
        f"{config.where}: unknown architecture: model_type {shown(model_type)}, architectures {shown(architectures)} "
        f"(known model types: {known})"
    )


def _identity(config: ConfigReader) -> tuple[object, list[object]]:
    """(model_type, architectures)"""
    architectures = config.get("architectures") or []
    return config.get("model_type"), architectures if isinstance(architectures, list) else [architectures]


def family_of_gguf(metadata: ConfigReader) -> Family:
    """The family of a GGUF file, by general.architecture."""
    architecture = metadata.get("general.architecture")
    known = [family for family in FAMILIES if family.gguf_naming is not None]
    for family in known:
        if architecture == family.name:
            return family
    names = ", ".join(family.name for family in known)
    raise ModelError(f"{metadata.where}: unknown architecture {shown(architecture)} (known in GGUF files: {names})")
