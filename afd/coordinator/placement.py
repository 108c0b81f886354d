"""Which FFN rank owns which routed expert: the published table of the cut that the FFN shards make."""

from __future__ import annotations

from afd.model.sharding import ShardSpec
from afd.types import FfnParallel


def expert_ranks(num_experts: int, num_ranks: int, parallel: FfnParallel) -> list[int]:
    """FFN rank of each routed expert, [num_experts], non-decreasing.

    Contiguous and near-even; with fewer experts than ranks some ranks own none. Empty where no rank owns an expert
    whole: a dense model, `tp`, or no FFN ranks (mono).
    """
    if num_experts == 0 or num_ranks == 0 or parallel is FfnParallel.TP:
        return []
    shards = [ShardSpec(rank, num_ranks, parallel) for rank in range(num_ranks)]
    return [shard.rank for shard in shards for _ in shard.experts(num_experts)]
