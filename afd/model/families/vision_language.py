"""Models around a text model (vision, audio): served as the text model inside, under the names that it has there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
from afd.model.spec import ModelSpec

TEXT_TYPES = {"step3_vl": "step3_text", "step3p7": "step3p5", "step_robotics": "qwen3"}
"""model_type of the whole -> of the text model inside, where text_config does not say."""

VISION_TENSORS = (
    r"(model\.)?(vision_model|vision_tower|visual|audio_tower|vision_embed_tokens)\..*",
    r"(model\.)?vit_downsampler2?\..*",
    r"(model\.)?(vit_large_projector|multi_modal_projector|mm_projector|connector|audio_projector)\..*",
    r"(model\.)?image_newline",
)
"""Names of parts that turn images and sounds into embeddings: nothing in them is read for text."""

LANGUAGE_MODEL_ALIASES = (
    (r"^(model\.)?(language_model|text_model)\.lm_head\.", "lm_head."),
    (r"^(model\.)?(language_model|text_model)\.(model\.)?", "model."),
)
BASE_MODEL_ALIASES = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)
"""A base model, saved without its head, names its tensors from within `model.`."""

_INHERITED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "quantization_config", "quantization",
    "compression_config", "tie_word_embeddings",
)  # fmt: skip
"""Keys beside text_config that count for the text model where text_config lacks them."""


def text_config(config: ConfigReader) -> ConfigReader | None:
    """The configuration of the text model inside, token ids and dtype of the whole included; None for a text model."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return None
    around = {key: config.get(key) for key in _INHERITED if config.has(key)}
    own = {key: value for key, value in inner.items() if value is not None or key not in around}
    model_type = inner.get("model_type") or TEXT_TYPES.get(str(config.get("model_type")))
    return ConfigReader({**around, **own, "model_type": model_type}, f"{config.where}: text_config")


def as_text_family(family: Family) -> Family:
    """The family for the whole model: the same text model, behind a nested configuration and beside a vision tower."""

    def read(config: ConfigReader, name: str) -> ModelSpec:
        inner = text_config(config)
        assert inner is not None, "chosen for a configuration with text_config"
        spec = family.parse(inner, name)
        _refuse_outside(config, inner)
        config.asked.update(config.values)  # the rest is about what is around the text model
        return spec

    naming = replace(
        family.naming,
        aliases=LANGUAGE_MODEL_ALIASES + family.naming.aliases,
        ignored=family.naming.ignored + VISION_TENSORS,
    )
    return replace(family, read=read, naming=naming)


def _refuse_outside(config: ConfigReader, inner: ConfigReader) -> None:
    """A key of the text model that stands beside text_config only: transformers does not look there."""
    for key in sorted(inner.asked & set(config.values)):
        if config.get(key) is not None and key not in inner.values:
            raise config.fail(key, "is read in text_config only, where it is missing: move it there, or remove it")


def with_base_names(naming: Naming) -> Naming:
    """The naming, which also knows the tensors of a base model."""
    return replace(naming, aliases=naming.aliases + BASE_MODEL_ALIASES)
