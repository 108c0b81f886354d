"""Models with a vision tower (Step-3, STEP3-VL, Step-3.7): served as the text model inside, images are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family
from afd.model.spec import ModelSpec

TEXT_TYPES = {"step3_vl": "step3_text", "step3p7": "step3p5", "step_robotics": "qwen3"}
"""model_type of the whole -> of the text model inside, where text_config does not say."""

VISION_TENSORS = (
    r"(model\.)?(vision_model|vision_tower|visual)\..*",
    r"(model\.)?vit_downsampler2?\..*",
    r"(model\.)?(vit_large_projector|multi_modal_projector)\..*",
)

LANGUAGE_MODEL_ALIASES = (
    (r"^(model\.language_model|language_model\.model)\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


def text_config(config: ConfigReader) -> ConfigReader | None:
    """The configuration of the text model inside, token ids and dtype of the whole included; None for a text model."""
    inner = config.values.get("text_config")
    if not isinstance(inner, Mapping):
        return None
    outer_type = config.values.get("model_type")
    own = {key: value for key, value in inner.items() if value is not None}
    values = {**config.values, "model_type": TEXT_TYPES.get(str(outer_type)), "architectures": None, **own}
    return ConfigReader(values, f"{config.where}: text_config")


def as_text_family(family: Family) -> Family:
    """The family for the whole model: the same text model, behind a nested configuration and beside a vision tower."""

    def parse(config: ConfigReader, name: str) -> ModelSpec:
        inner = text_config(config)
        assert inner is not None, "chosen for a configuration with text_config"
        return family.parse(inner, name)

    naming = replace(
        family.naming,
        aliases=family.naming.aliases + LANGUAGE_MODEL_ALIASES,
        ignored=family.naming.ignored + VISION_TENSORS,
    )
    return replace(family, parse=parse, naming=naming)
