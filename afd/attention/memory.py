"""What an attention worker holds in memory, and whether its device has room for it."""

from __future__ import annotations

import logging
from typing import NamedTuple

from afd.config import ClusterConfig
from afd.model.inspect import attention_bytes, ffn_bytes
from afd.model.sharding import ShardSpec
from afd.model.spec import ModelSpec
from afd.types import MAX_STREAMS

log = logging.getLogger(__name__)

_LOGIT_BYTES = 4
_GIB = 2**30


class MemoryBudget(NamedTuple):
    """Bytes.

    weights: the attention half, in topology mono the other one, too.
    kv_cache: all blocks.
    logits: rows of the vocabulary out of which tokens are drawn, at most: every stream keeps room for its largest
        batch. Batches that are greedy throughout need none.
    """

    weights: int
    kv_cache: int
    logits: int

    def shortage(self, available: int) -> str | None:
        """What to change where so many bytes are not enough; None where they are."""
        if sum(self) <= available:
            return None
        return (
            f"this worker can come to hold {_gib(sum(self))} ({self}), there are {_gib(available)}: lower "
            "attention.kv_cache_gib, or attention.max_num_seqs for less room for logits"
        )

    def __str__(self) -> str:
        return f"weights {_gib(self.weights)}, KV cache {_gib(self.kv_cache)}, logits up to {_gib(self.logits)}"


def budget_of(config: ClusterConfig, spec: ModelSpec, kv_bytes: int) -> MemoryBudget:
    """The budget of an attention worker."""
    section, model, mono = config.attention, config.model, config.topology.mono
    weights = attention_bytes(spec, model.dtype, model.weights)
    if mono:
        weights += ffn_bytes(spec, ShardSpec(), model.dtype, model.weights)
    num_streams = section.streams or (1 if mono else MAX_STREAMS)
    rows = min(section.max_num_seqs, section.max_step_tokens)
    return MemoryBudget(weights, kv_bytes, num_streams * rows * spec.vocab_size * _LOGIT_BYTES)


def tell(budget: MemoryBudget, available: int) -> None:
    """Log the budget, with a warning where the device does not have so many bytes."""
    log.info("memory: %s", budget)
    if shortage := budget.shortage(available):
        log.warning("%s", shortage)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
