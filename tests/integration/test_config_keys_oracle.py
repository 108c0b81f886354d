"""Every key of transformers' configuration classes, one at a time at another value or absent: AFD gives the logits that
transformers gives, or refuses the key by name. A setting that changes the numbers is never ignored.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.utils import logging

from afd.errors import ModelError
from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import forward
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from tests.oracles.families import MODELS, STEP3P5_CONFIG, VOCAB, randomise, save_step3p5

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3-moe", "deepseek-v3", "ernie-4.5-moe", "step3p5")
PROMPT_TOKENS = 40
BLOCKS = [3, 1, 7, 0, 2, 5, 4, 6]
HARD_CODED = (
    "norm_expert_weight", "use_qk_norm", "use_head_wise_attn_gate", "zero_centered", "use_moe_router_bias",
    "need_fp32_gate", "moe_router_activation", "yarn_only_types",
)  # fmt: skip
"""Keys of the published Step-3.5 configuration that transformers does not read: it does what they say there."""

IDENTITY = (*HARD_CODED, "architectures", "model_type", "transformers_version", "sub_configs_defaults")

OTHER_VALUES: dict[str, list[Any]] = {
    "dtype": ["bfloat16"], "hidden_act": ["gelu", "relu"], "hidden_size": [48], "intermediate_size": [80],
    "num_hidden_layers": [2, 4], "num_attention_heads": [12, 2], "num_key_value_heads": [1, 3, None],
    "head_dim": [32, 8, None], "vocab_size": [VOCAB, 192], "rms_norm_eps": [1e-2], "max_position_embeddings": [256],
    "eos_token_id": [7, [3, 4], None], "bos_token_id": [5, None], "pad_token_id": [0, None],
    "layer_types": [["sliding_attention"] * 3, ["full_attention"] * 3], "sliding_window": [8, None],
    "max_window_layers": [1], "mlp_only_layers": [[1], [0, 1, 2], None], "num_experts": [4, 12],
    "num_experts_per_tok": [1, 5], "decoder_sparse_step": [2], "moe_intermediate_size": [40],
    "n_routed_experts": [8, 32], "n_shared_experts": [0, 3], "routed_scaling_factor": [1.0, 0.3],
    "kv_lora_rank": [24], "q_lora_rank": [16, None], "qk_rope_head_dim": [8, 24], "v_head_dim": [32],
    "qk_nope_head_dim": [8], "n_group": [1, 2], "topk_group": [1, 3], "first_k_dense_replace": [0, 2, 3],
    "moe_k": [1, 4], "moe_num_experts": [4], "moe_num_shared_experts": [0, 1], "moe_layer_start_index": [0, 2],
    "moe_layer_end_index": [1], "moe_layer_interval": [2], "moe_norm_min": [0.9],
    "num_sliding_attention_heads": [4, 8], "query_pre_attn_scalar": [64, 4.0], "swiglu_limits": [[0.05] * 6, None],
    "swiglu_limits_shared": [[0.05] * 6, None], "moe_router_scaling_factor": [1.0], "share_expert_dim": [48],
    "attention_other_setting": [{"num_attention_heads": 2}, None], "moe_layers_enum": ["0,1", [2, 3]],
    "num_local_experts": [12], "partial_rotary_factors": [[0.25] * 6, None],
    "yarn_only_types": [["sliding_attention"]], "id2label": [{"0": "a"}], "label2id": [{"a": 0}],
    "problem_type": ["regression"], "mlp_layer_types": [["sparse", "dense", "dense", "sparse", "sparse"]],
    "rope_theta": [1e3, [1e3, 1e2, 1e2, 1e2, 1e3, 1e2]], "num_attention_groups": [1, 4], "moe_top_k": [1, 5],
    "rope_scaling": [None, {"rope_type": "linear", "factor": 4.0}], "mtp_layer_types": [["full_attention"]],
    "num_nextn_predict_layers": [0, 1], "tie_word_embeddings": [True, False],
}  # fmt: skip
"""Values that make sense for a key; for the others the value itself says what is another one."""

SETTINGS_OF_OTHERS: dict[str, list[Any]] = {
    "partial_rotary_factor": [0.5], "attention_bias": [True], "mlp_bias": [True], "use_sliding_window": [True],
    "logit_scale": [0.25], "final_logit_softcapping": [5.0], "attn_logit_softcapping": [5.0],
    "residual_multiplier": [0.5], "embedding_multiplier": [3.0], "attention_multiplier": [0.5],
    "use_bidirectional_attention": [True], "is_causal": [False], "per_layer_config": [{"1": {"head_dim": 8}}, {}],
    "query_pre_attn_scalar": [64], "original_max_position_embeddings": [16], "rope_interleave": [False, True],
    "sinks": [True], "no_rope_layers": [[1]],
}  # fmt: skip
"""Keys that other classes have: without effect in transformers here, or of effect through code that is shared."""

OTHER_NAMES = {"num_local_experts": ("num_experts",)}
"""What a key is called besides, and where its absence may be told by that name."""

CONTRADICTED = {
    "num_hidden_layers": ("layer_types", "moe_layer_end_index", "mlp_only_layers"),
    "num_attention_heads": ("num_key_value_heads",),
    "num_experts": ("num_local_experts",),
    "n_routed_experts": ("num_local_experts", "moe_num_experts"),
    "num_local_experts": ("moe_num_experts",),
    "num_experts_per_tok": ("moe_top_k",),
    "num_key_value_heads": ("num_attention_groups",),
    "num_sliding_attention_heads": ("attention_other_setting",),
    "num_nextn_predict_layers": ("moe_layers_enum",),
    "rope_theta": ("layer_types",),
    "partial_rotary_factors": ("layer_types",),
}
"""Keys that another value of a key contradicts; the refusal may name either."""

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 500.0, "factor": 4.0},
    {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
    {"type": "linear", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 0, "beta_slow": 0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale_all_dim": 0.4},
]  # fmt: skip


class Oracle:
    """transformers' model of a configuration: its logits, saved into a folder beside that very config.json."""

    def __init__(self, family: str, folder: Path):
        self._family = family
        self._folder = folder
        folder.mkdir(exist_ok=True)
        if family == "step3p5":
            self.base = dict(STEP3P5_CONFIG)
        else:
            self._kind = type(MODELS[family]())
            MODELS[family]().config.save_pretrained(folder)
            self.base = json.loads((folder / "config.json").read_text())
        self.ids = torch.randint(VOCAB, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(5))

    @property
    def keys(self) -> list[str]:
        """Those of the class and of the saved configuration."""
        config = MODELS[self._family]().config if self._family != "step3p5" else Step3p7TextConfig()
        names = {field.name for field in dataclasses.fields(config)} | set(self.base)
        return sorted(name for name in names if not name.startswith("_") and name not in IDENTITY)

    @torch.inference_mode()
    def save(self, raw: dict[str, Any]) -> torch.Tensor | None:
        """None where transformers cannot make, save or run such a model."""
        torch.manual_seed(11)
        try:
            if self._family == "step3p5":
                logits: Callable[[torch.Tensor], torch.Tensor] = save_step3p5(self._folder, copy.deepcopy(raw))
            else:
                model: nn.Module = self._kind(self._kind.config_class.from_dict(copy.deepcopy(raw))).eval()
                randomise(model)
                model.float().save_pretrained(self._folder)
                logits = lambda ids: model(ids).logits  # noqa: E731
            (self._folder / "config.json").write_text(json.dumps(raw))
            return logits(self.ids[None])[0]
        except Exception:
            return None

    @torch.inference_mode()
    def served(self) -> torch.Tensor:
        """What AFD computes of the folder."""
        found = resolve_model(str(self._folder))
        attention, ffn = (
            load_attention_half(found, select("cpu", "float32")),
            load_ffn_half(found, ShardSpec(), select("cpu", "float32")),
        )
        batch = AttentionBatch.build([(0, PROMPT_TOKENS, BLOCKS)], 8)
        cache = KVCache(attention.spec, 8, 8, torch.float32)
        return attention.logits(forward(attention, [ffn], self.ids, batch, cache))

    def refusal(self, raw: dict[str, Any]) -> str | None:
        """What AFD says of the configuration alone, whatever the weights."""
        (self._folder / "config.json").write_text(json.dumps(raw))
        try:
            resolve_model(str(self._folder))
        except ModelError as error:
            return str(error)
        return None

    def wrong(self, raw: dict[str, Any], *names: str) -> str | None:
        """What is wrong with AFD's answer to a configuration that differs in `names`; None when nothing is."""
        refusal = self.refusal(raw)
        if refusal is not None and any(f" {name}:" in refusal or f" {name} None" in refusal for name in names):
            return None
        want = self.save(raw)
        if want is None:
            return None  # no such model: there is nothing to be equal to
        if refusal is not None and "tensor" not in refusal:
            return f"refused, but for another reason: {refusal}"
        try:
            got = self.served()
        except ModelError as error:
            return f"refused: {error}"
        distance = float((got - want).norm() / want.norm())
        return None if distance < 1e-5 else f"relative L2 {distance:.1e}"


@pytest.fixture(params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Oracle]:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    oracle = Oracle(request.param, tmp_path / "model")
    assert oracle.wrong(oracle.base) is None
    yield oracle


def _others(key: str, value: Any) -> list[Any]:
    """Values of a key that differ from `value`."""
    if key in OTHER_VALUES:
        return [other for other in OTHER_VALUES[key] if other != value]
    if isinstance(value, bool) or value is None:
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value * 2 + 0.25] if isinstance(value, float) else [value + 1]
    return []


def test_every_key_at_another_value_gives_transformers_logits_or_is_refused(oracle: Oracle) -> None:
    wrong = {}
    num_tried = 0
    for key in oracle.keys:
        for other in _others(key, oracle.base.get(key)) + SETTINGS_OF_OTHERS.get(key, []):
            num_tried += 1
            wrong[key, str(other)] = oracle.wrong({**oracle.base, key: other}, key, *CONTRADICTED.get(key, ()))
    for key, others in SETTINGS_OF_OTHERS.items():
        for other in others if key not in oracle.keys else ():
            wrong[key, str(other)] = oracle.wrong({**oracle.base, key: other}, key)
    assert {name: what for name, what in wrong.items() if what is not None} == {}
    assert num_tried > 30


def test_every_absent_key_is_the_classes_default_or_missing(oracle: Oracle) -> None:
    wrong = {
        key: oracle.wrong({k: v for k, v in oracle.base.items() if k != key}, key, *OTHER_NAMES.get(key, ()))
        for key in oracle.base
    }
    assert {name: what for name, what in wrong.items() if what is not None} == {}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_every_rotary_setting_gives_transformers_logits_or_is_refused(oracle: Oracle, spelling: str) -> None:
    base = {k: v for k, v in oracle.base.items() if k not in ("rope_parameters", "rope_scaling")}
    if "rope_theta" not in base and spelling == "rope_scaling":
        base["rope_theta"] = 2000.0
    wrong = {}
    for rope in ROPES:
        for beside in ({}, {"original_max_position_embeddings": 32}):
            raw = {**base, spelling: rope, **beside}
            wrong[json.dumps([rope, beside])] = oracle.wrong(raw, "rope_scaling", "rope_parameters", *rope, *beside)
    assert {name: what for name, what in wrong.items() if what is not None} == {}
