"""Rotary settings from a configuration, in every published spelling, as transformers reads them."""

from __future__ import annotations

import math
from collections.abc import Collection

from afd.model.families.config_reader import MAX_SIZE, ConfigReader, shown
from afd.model.spec import RopeScaling

_NO_PART = frozenset(("original_max_position_embeddings", "finetuned"))
"""Keys of a rotary object that change nothing where its type does not read them."""


def read_rope(
    config: ConfigReader, default_theta: float, context: int, also: Collection[str] = ()
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from rope_theta with rope_scaling, or from one rope_parameters object.

    context: max_position_embeddings, the trained context where none is named.
    also: further keys of the object that the family reads itself.
    """
    inner = _object(config)
    theta = inner.positive("rope_theta", config.positive("rope_theta", default_theta))
    inner.refuse("partial_rotary_factor", unless=1.0)
    kind = _kind(inner)
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", inner.positive("factor"))
    elif kind == "llama3":
        scaling = _llama3(inner, _original_context(config, inner, context))
    elif kind == "yarn":
        scaling = _yarn(inner, theta, _original_context(config, inner, context), context)
    else:
        raise config.fail("rope_scaling", f"type {shown(kind)} is not supported (known: default, linear, llama3, yarn)")
    config.get("original_max_position_embeddings")
    inner.refuse_rest(_NO_PART | frozenset(also), f"rotary type {kind!r}")
    return theta, scaling


def _object(config: ConfigReader) -> ConfigReader:
    """rope_scaling if it is set, as in transformers, else rope_parameters; both at once must not contradict."""
    scaling, parameters = config.section("rope_scaling"), config.section("rope_parameters")
    if scaling is not None and parameters is not None:
        for key, value in parameters.values.items():
            meant = scaling.values.get(key, config.values.get(key))
            if value is not None and value != meant:
                raise config.fail(
                    "rope_parameters", f"{key} {shown(value)} contradicts rope_scaling and the keys beside it"
                )
    return scaling or parameters or ConfigReader({}, f"{config.where}: rope_scaling")


def _kind(inner: ConfigReader) -> object:
    new, old = inner.get("rope_type"), inner.get("type")
    if new is not None and old is not None and new != old:
        raise inner.fail("type", f"{shown(old)} contradicts rope_type, {shown(new)}")
    return new or old or "default"


def _original_context(config: ConfigReader, inner: ConfigReader, context: int) -> int:
    """The key beside the object counts before the one inside."""
    own = inner.integer("original_max_position_embeddings", default=context)
    return config.integer("original_max_position_embeddings", default=own)


def _llama3(inner: ConfigReader, original: int) -> RopeScaling:
    low, high = inner.positive("low_freq_factor"), inner.positive("high_freq_factor")
    if high <= low:
        raise inner.fail("high_freq_factor", f"{high} is not above low_freq_factor, {low}")
    return RopeScaling(
        "llama3",
        factor=inner.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=original,
    )


def _yarn(inner: ConfigReader, theta: float, original: int, context: int) -> RopeScaling:
    if theta <= 1.0:
        raise inner.fail("rope_theta", f"{theta} is not above 1, as YaRN needs it")
    factor = inner.positive("factor", context / original)
    mscale, mscale_all = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)
    attention_factor = yarn_mscale(factor, 1.0)
    if mscale and mscale_all:
        over = yarn_mscale(factor, mscale_all)
        if over <= 0.0:
            raise inner.fail("mscale_all_dim", f"{mscale_all} gives an attention factor that is not above 0")
        attention_factor = yarn_mscale(factor, mscale) / over
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=_turns(inner, "beta_fast", 32.0),
        beta_slow=_turns(inner, "beta_slow", 1.0),
        attention_factor=inner.number("attention_factor", attention_factor),
        truncate=inner.flag("truncate", True),
    )


def _turns(inner: ConfigReader, key: str, default: float) -> float:
    """0 stands for the default, as in transformers."""
    turns = inner.number(key, default) or default
    if not 0.0 < turns <= MAX_SIZE:
        raise inner.fail(key, f"expected a number of turns above 0, found {turns}")
    return turns


def yarn_context(scaling: RopeScaling | None) -> float | None:
    """The context that YaRN stretches to: its factor times the trained one. None for other scalings."""
    if scaling is None or scaling.kind != "yarn":
        return None
    return scaling.original_max_position * scaling.factor


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, equation 22, with DeepSeek's multiplier)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
