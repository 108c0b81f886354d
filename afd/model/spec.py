"""What a model is, as plain values: made once from config.json or GGUF metadata, read by everything else.

A layer is one attention kind and one FFN kind; a model is a tuple of layers. Nothing here knows a tensor
library or a file format.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

WEIGHT_TYPES = ("auto", "int8", "int8-all")
"""Values of `model.weights`: all in the compute dtype; the FFN's in int8; attention's (not MLA's) and head's too."""


class AttentionKind(StrEnum):
    GQA = "gqa"  # q, k, v straight from the hidden state; num_kv_heads K/V heads
    MFA = "mfa"  # Step-3: low-rank query with a norm between its two matrices, one shared K and V head
    MLA = "mla"  # DeepSeek: one latent per token is cached; keys and values are linear images of it


class FfnKind(StrEnum):
    DENSE = "dense"
    MOE = "moe"


class RouterRule(StrEnum):
    SOFTMAX = "softmax"  # softmax over all experts, then the top k
    SIGMOID = "sigmoid"  # each expert's logit by itself, then the top k


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of the rotary frequencies for long contexts.

    linear: every frequency / factor.
    llama3: low frequencies / factor, high ones kept, smooth in between (thresholds
    as wavelengths: original_max_position / {low,high}_freq_factor).
    yarn: the same with a ramp over the dimensions that turn beta_fast to beta_slow times in the original context; cos
    and sin are times attention_factor.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` of a head's dimensions.

    interleaved: pairs are (2i, 2i+1); otherwise (i, i + rotary_dim/2), the "NeoX" or half-split form.
    divisors: one for each of the rotary_dim/2 frequencies, stored with the weights (llama.cpp); () = none.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    scaling: RopeScaling | None = None
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention.

    head_dim: of queries and keys, rotary part included.
    window: a query sees keys j with i - j < window; 0 = all.
    q_rank: width of the low-rank query (MFA, MLA); 0 = none.
    kv_rank: of MLA's latent, without the rotary part.
    qk_norm: RMSNorm of each query and key head before the rotation.
    head_gate: each head's output is multiplied by the sigmoid of a linear function of the layer's input.
    temperature: times head_dim**-0.5 in the scores' scale.
    """

    kind: AttentionKind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rope: RopeSpec
    q_rank: int = 0
    kv_rank: int = 0
    window: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    head_gate: bool = False
    temperature: float = 1.0

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5) * self.temperature

    @property
    def cached_k_dim(self) -> int:
        """Width of a token's K entry, for each of num_kv_heads. MLA: the latent and the rotated key part."""
        return self.kv_rank + self.rope.rotary_dim if self.kind is AttentionKind.MLA else self.head_dim

    @property
    def cached_v_dim(self) -> int:
        """Width of a token's V entry. MLA caches none: values are read from the latent."""
        return 0 if self.kind is AttentionKind.MLA else self.v_head_dim

    @property
    def kv_elements_per_token(self) -> int:
        return self.num_kv_heads * (self.cached_k_dim + self.cached_v_dim)


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How experts are chosen and weighted.

    dtype: of the logits; "activation" = the model's compute dtype. Scores are float32 always.
    selection_bias: a stored bias joins the scores for the choice; weights are the scores without it.
    num_groups, top_groups: with more than one group the choice is among the experts of the top_groups groups whose two
    best (biased) scores add up to most.
    renormalise: weights are divided by their sum, at least norm_min.
    scaling: times every weight.
    """

    rule: RouterRule = RouterRule.SOFTMAX
    dtype: Literal["activation", "float32"] = "activation"
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    norm_min: float = 1e-20
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """intermediate: width of the dense FFN, or of one routed expert.
    shared_intermediate: 0 = no shared expert.

    limit, shared_limit: bounds of the clamped SwiGLU, min(silu(gate), limit) * clamp(up, -limit, limit); 0 = none.
    """

    kind: FfnKind
    intermediate: int
    num_experts: int = 0
    top_k: int = 0
    shared_intermediate: int = 0
    router: RouterSpec | None = None
    limit: float = 0.0
    shared_limit: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: AttentionSpec
    ffn: FfnSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """eos_token_ids: every id that ends a text.
    torch_dtype: what the checkpoint was trained in, a hint only.

    zero_centred_norms: norm weights are stored as offsets from 1.
    """

    name: str
    family: str
    hidden: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    rms_eps: float
    tie_embeddings: bool
    max_context: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "bfloat16"
    zero_centred_norms: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_layers(self) -> tuple[AttentionSpec, ...]:
        return tuple(layer.attention for layer in self.layers)

    @property
    def max_window(self) -> int:
        """The widest sliding window; 0 for a model without."""
        return max((attention.window for attention in self.attention_layers), default=0)

    @property
    def max_top_k(self) -> int:
        """Largest number of experts per token over the layers; 0 for a dense model."""
        return max((layer.ffn.top_k for layer in self.layers), default=0)

    @property
    def num_experts(self) -> int:
        """Largest number of routed experts over the layers; 0 for a dense model."""
        return max((layer.ffn.num_experts for layer in self.layers), default=0)

    def kv_elements_per_token(self) -> int:
        return sum(layer.attention.kv_elements_per_token for layer in self.layers)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one token of context holds in the KV cache over all layers, in `dtype`."""
        return self.kv_elements_per_token() * DTYPE_BYTES[dtype]
