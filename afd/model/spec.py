"""What a model is, as plain values: made once from config.json or GGUF metadata, read by everything else.

A layer is one attention kind and one FFN kind; a model is a tuple of layers. Nothing here knows a tensor
library or a file format.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class AttentionKind(StrEnum):
    GQA = "gqa"  # q, k, v straight from the hidden state; num_kv_heads K/V heads
    MFA = "mfa"  # Step-3: low-rank query with a norm between its two matrices, one shared K and V head


class FfnKind(StrEnum):
    DENSE = "dense"
    MOE = "moe"


class RouterRule(StrEnum):
    SOFTMAX = "softmax"  # softmax over all experts, then the top k


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of the rotary frequencies for long contexts.

    linear: every frequency / factor.  llama3: low frequencies / factor, high ones kept, smooth in between
    (thresholds as wavelengths: original_max_position / {low,high}_freq_factor).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` of a head's dimensions.

    interleaved: pairs are (2i, 2i+1); otherwise (i, i + rotary_dim/2), the "NeoX" or half-split form.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """window: a query sees keys j with i - j < window; 0 = all.  q_rank: width of MFA's low-rank query, else 0."""

    kind: AttentionKind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rope: RopeSpec
    q_rank: int = 0
    window: int = 0

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def kv_elements_per_token(self) -> int:
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """dtype: of the router's logits; "activation" = the model's compute dtype. Scores are float32 always."""

    rule: RouterRule = RouterRule.SOFTMAX
    dtype: Literal["activation", "float32"] = "activation"
    renormalise: bool = False
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """intermediate: width of the dense FFN, or of one routed expert.  shared_intermediate: 0 = no shared expert."""

    kind: FfnKind
    intermediate: int
    num_experts: int = 0
    top_k: int = 0
    shared_intermediate: int = 0
    router: RouterSpec | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: AttentionSpec
    ffn: FfnSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """eos_token_ids: every id that ends a text.  torch_dtype: what the checkpoint was trained in, a hint only."""

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

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_layers(self) -> tuple[AttentionSpec, ...]:
        return tuple(layer.attention for layer in self.layers)

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
