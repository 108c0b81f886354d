"""Which layers of a Hugging Face config are dense and which are mixtures of experts, and how wide they are."""

from __future__ import annotations

from typing import Any

from afd.errors import ConfigError
from afd.plan.hf_keys import Keys
from afd.plan.models import FfnGroup

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "experts_per_token")
_MOE_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
_DENSE_WIDTH = ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "share_expert_dim", "shared_intermediate_size")
_SHARED_COUNT = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "num_shared_expert")

_UNGATED = ("gpt2", "gpt_neox", "opt", "phi", "falcon", "starcoder2")
_UNGATED_ACTIVATIONS = ("relu", "relu2", "squared_relu")


def ffn_groups(keys: Keys, model_type: str, layers: int) -> list[FfnGroup]:
    """One group of one layer for each layer, in order."""
    activation = keys.value("hidden_act", "hidden_activation", "activation_function")
    matrices = 2 if model_type in _UNGATED or activation in _UNGATED_ACTIVATIONS else 3
    experts = _maximum(keys, _EXPERTS)
    if experts <= 1:
        width = keys.integer(*_DENSE_WIDTH)
        return [FfnGroup(layers=1, intermediate=width, matrices=matrices)] * layers
    moe_width = _maximum(keys, _MOE_WIDTH) or keys.integer("intermediate_size")
    moe = FfnGroup(
        layers=1,
        intermediate=moe_width,
        experts=experts,
        top_k=_maximum(keys, _TOP_K),
        shared_intermediate=_shared_width(keys, model_type, moe_width),
        matrices=matrices,
    )
    is_moe = _moe_layers(keys, model_type, layers)
    if all(is_moe):
        return [moe] * layers
    dense = FfnGroup(layers=1, intermediate=keys.integer(*_DENSE_WIDTH), matrices=matrices)
    return [moe if chosen else dense for chosen in is_moe]


def _shared_width(keys: Keys, model_type: str, moe_width: int) -> int:
    width = _maximum(keys, _SHARED_WIDTH)
    if width:
        return width
    if model_type.startswith("llama4"):
        return moe_width  # always one shared expert, as wide as a routed one; no key says so
    return _maximum(keys, _SHARED_COUNT) * moe_width


def _moe_layers(keys: Keys, model_type: str, layers: int) -> list[bool]:
    """Whether each layer is a mixture, by the first rule that the config states."""
    listed = keys.value("moe_layers_enum", "moe_layers")
    if listed is not None:
        chosen = _indices(listed, keys.where)
        return [i in chosen for i in range(layers)]
    kinds = keys.value("mlp_layer_types")
    if isinstance(kinds, list) and len(kinds) >= layers:
        return [kind == "sparse" for kind in kinds[:layers]]
    if model_type.startswith("step3"):
        return [i > 0 for i in range(layers)]  # the engines' rule when moe_layers_enum is absent
    if "interleave_moe_layer_step" in keys:
        step = max(1, keys.integer("interleave_moe_layer_step"))
        return [(i + 1) % step == 0 for i in range(layers)]
    if "moe_layer_start_index" in keys:
        start, interval = keys.integer("moe_layer_start_index"), keys.integer("moe_layer_interval", default=1)
        end = keys.value("moe_layer_end_index")
        last = end if isinstance(end, int) and end >= 0 else layers - 1
        return [start <= i <= last and (i + 1) % max(1, interval) == 0 for i in range(layers)]
    dense_first = keys.integer("first_k_dense_replace", "num_dense_layers", default=0)
    frequency = keys.value("moe_layer_freq", "decoder_sparse_step")
    if isinstance(frequency, list) and len(frequency) >= layers:
        return [bool(chosen) for chosen in frequency[:layers]]
    step = frequency if isinstance(frequency, int) and frequency > 0 else 1
    dense_only = _indices(keys.value("mlp_only_layers") or [], keys.where)
    # DeepSeek counts its stride from 0, Qwen from 1; with a stride of 1 they are the same.
    offset = 1 if "decoder_sparse_step" in keys else 0
    return [i >= dense_first and i not in dense_only and (i + offset) % step == 0 for i in range(layers)]


def _indices(value: Any, where: str) -> set[int]:
    """Layer indices from a list, or from the comma-separated string of Step-3 checkpoints."""
    items = value.split(",") if isinstance(value, str) else value
    try:
        return {int(item) for item in items if str(item).strip()}
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: expected a list of layer indices, found {value!r}") from None


def _maximum(keys: Keys, names: tuple[str, ...]) -> int:
    """The fact under any of its names; 0 when absent. A list (per layer or modality) counts by its largest entry."""
    value = keys.value(*names)
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return max(int(item) for item in value)
    return keys.integer(*names, default=0)
