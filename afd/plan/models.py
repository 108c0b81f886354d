"""Model shapes: what one decoded token costs in bytes and FLOPs, and what the weights weigh. Counts only, no I/O.

FLOPs are 2 x multiply-accumulate. "Linear" is the attention's projections, "attention" its core (scores and values),
"FFN" the dense, shared and routed experts a token goes through. Formulas: Step-3 report section 4, Tables 2 and 3.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import msgspec

from afd.plan.attention import AnyAttention, NonNegative, Positive
from afd.plan.weights import BYTES_OF, WeightBytes


class FfnGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`layers` equal feed-forward layers; dense when `experts` is 0.

    intermediate: width of the dense FFN or of one routed expert.
    shared_intermediate: total width of the shared experts.
    matrices: 3 for gated units (SwiGLU), 2 without a gate.
    """

    layers: Positive
    intermediate: Positive
    experts: NonNegative = 0
    top_k: NonNegative = 0
    shared_intermediate: NonNegative = 0
    matrices: Annotated[int, msgspec.Meta(ge=2, le=3)] = 3

    def __post_init__(self) -> None:
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k {self.top_k} must be between 1 and experts {self.experts}")
        if not self.experts and (self.top_k or self.shared_intermediate):
            raise ValueError("top_k and shared_intermediate need experts")

    def expert_weights(self, hidden: int) -> int:
        """Weights of one routed expert, or of the dense FFN, of one layer."""
        return self.matrices * hidden * self.intermediate

    def fixed_weights(self, hidden: int) -> int:
        """Weights of one layer that every token uses: the dense FFN, or the shared experts."""
        return self.matrices * hidden * (self.shared_intermediate if self.experts else self.intermediate)

    def active_weights(self, hidden: int) -> int:
        """Weights of one layer that one token uses."""
        return self.fixed_weights(hidden) + self.top_k * self.expert_weights(hidden)

    def total_weights(self, hidden: int) -> int:
        """Weights of one layer."""
        return self.fixed_weights(hidden) + self.experts * self.expert_weights(hidden)

    def experts_hit(self, num_tokens: float) -> float:
        """Expected number of distinct routed experts that `num_tokens` tokens choose, routing uniform."""
        if not self.experts:
            return 0.0
        return self.experts * float(1.0 - (1.0 - self.top_k / self.experts) ** num_tokens)

    @property
    def sparsity(self) -> float:
        """Active share of the experts, one shared expert counted on both sides (report section 4.5); 1 if dense."""
        if not self.experts:
            return 1.0
        shared = self.shared_intermediate / self.intermediate
        return (self.top_k + shared) / (self.experts + shared)


class DraftLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One layer that predicts a further token (MTP), with its projection of the embedding and the hidden state.

    count: how many the checkpoint has; more drafts run the last one again.
    own_head: each has an LM head of its own.
    """

    count: Positive
    attention: AnyAttention
    ffn: FfnGroup
    own_head: bool = False

    def dense_weights(self, hidden: int) -> int:
        """Weights on the attention chips but for the head: a dense FFN stays there, a mixture does not."""
        ffn = 0 if self.ffn.experts else self.ffn.fixed_weights(hidden)
        return 2 * hidden * hidden + self.attention.linear_weights(hidden) + ffn


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """A decoder as counts, each summed once.

    activated_params: what the publisher quotes, in 1e9; 0 = not quoted.
    weights: as published, or as the deployment that is planned for has them.
    """

    name: str
    title: str
    hidden: Positive
    vocab: Positive
    max_context: Positive
    attention: tuple[AnyAttention, ...]
    ffn: tuple[FfnGroup, ...]
    source: str
    tied: bool = False
    weights: WeightBytes = WeightBytes()
    draft: DraftLayer | None = None
    activated_params: Annotated[float, msgspec.Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        attention_layers = sum(group.layers for group in self.attention)
        ffn_layers = sum(group.layers for group in self.ffn)
        if attention_layers != ffn_layers or not attention_layers:
            raise ValueError(f"{attention_layers} attention layers but {ffn_layers} FFN layers")

    @cached_property
    def num_layers(self) -> int:
        return sum(group.layers for group in self.attention)

    def weighted(self, dtype: str | None) -> ModelShape:
        """With all weights of the given `--weight-dtype`; None = as they are."""
        return self if dtype is None else msgspec.structs.replace(self, weights=WeightBytes.all(BYTES_OF[dtype]))

    # One decoded token at `context` cached tokens.

    def kv_bytes(self, context: int, kv_bytes: float | None = None) -> float:
        """KV (and state) bytes one token's step moves.

        kv_bytes: bytes per element; None = as published.
        """
        return sum(group.moved_bytes(context, kv_bytes) for group in self.attention)

    def kv_resident_bytes(self, context: int, kv_bytes: float | None = None) -> float:
        """KV (and state) bytes one request holds."""
        return sum(group.resident_bytes(context, kv_bytes) for group in self.attention)

    def attention_flops(self, context: float) -> float:
        return sum(group.core_flops(context) for group in self.attention)

    @cached_property
    def linear_flops(self) -> int:
        return 2 * self.linear_weights

    @cached_property
    def ffn_flops(self) -> int:
        return 2 * self.ffn_active_weights

    # Weights, in elements.

    @cached_property
    def linear_weights(self) -> int:
        return sum(group.layers * group.linear_weights(self.hidden) for group in self.attention)

    @cached_property
    def ffn_active_weights(self) -> int:
        return sum(group.layers * group.active_weights(self.hidden) for group in self.ffn)

    @cached_property
    def ffn_weights(self) -> int:
        return sum(group.layers * group.total_weights(self.hidden) for group in self.ffn)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def embedding_weights(self) -> int:
        """Embedding and LM head together."""
        return self.head_weights * (1 if self.tied else 2)

    @property
    def total_params(self) -> int:
        return self.linear_weights + self.ffn_weights + self.embedding_weights

    @property
    def active_params(self) -> int:
        """Weights one token goes through, LM head included, input embedding not."""
        return self.linear_weights + self.ffn_active_weights + self.head_weights

    @property
    def sparsity(self) -> float:
        """Sparsity of the MoE layers (the first MoE group stands for all); 1 for a dense model."""
        return next((group.sparsity for group in self.ffn if group.experts), 1.0)

    @cached_property
    def max_top_k(self) -> int:
        return max(group.top_k for group in self.ffn)

    @property
    def has_shared_expert(self) -> bool:
        return any(group.shared_intermediate for group in self.ffn)
