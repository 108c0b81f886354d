"""Which rows of a micro-batch each FFN rank is sent with `cluster.dispatch = sparse`. Pure: routing in, indices out.

A rank needs a row for one of two reasons: it holds an expert that the row is routed to, or it computes the shared
expert for that row. To any other row it would answer zeros. Both follow from the cut by which the FFN workers load
their weights (`ShardSpec`). A rank that no row needs still gets a header without rows and answers it: gangs are the
same at every FFN rank, whatever the routing, because membership counts dispatches, not rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from afd.model.sharding import ShardSpec
from afd.model.spec import FfnKind, FfnSpec, ModelSpec
from afd.types import FfnParallel


class RowSelection:
    """Which rows each FFN rank needs.

    The ranks cut `spec` by `parallel`, a combination that `check_sparse` has let pass.
    """

    def __init__(self, spec: ModelSpec, num_ranks: int, parallel: FfnParallel):
        self._num_ranks = num_ranks
        shards = [ShardSpec(rank, num_ranks, parallel) for rank in range(num_ranks)]
        self._rank_of_expert = [_rank_of_expert(layer.ffn, shards) for layer in spec.layers]
        self._has_shared = [layer.ffn.shared_intermediate > 0 for layer in spec.layers]

    def rows_of_ranks(self, layer: int, expert_ids: npt.NDArray[np.int32] | None) -> list[npt.NDArray[np.intp]] | None:
        """The rows that each FFN rank needs, rising; None: every rank needs every row.

        expert_ids: [num_tokens, top_k], None at a dense layer.
        """
        if expert_ids is None or self._num_ranks == 1:
            return None
        places = np.arange(expert_ids.shape[0])
        needed = np.zeros((self._num_ranks, expert_ids.shape[0]), np.bool_)
        needed[self._rank_of_expert[layer][expert_ids], places[:, None]] = True
        if self._has_shared[layer]:
            needed[places % self._num_ranks, places] = True
        return [np.flatnonzero(of_rank) for of_rank in needed]


def _rank_of_expert(ffn: FfnSpec, shards: list[ShardSpec]) -> npt.NDArray[np.intp]:
    """FFN rank of each routed expert of a layer, [num_experts]; empty at a dense one."""
    if ffn.kind is not FfnKind.MOE:
        return np.empty(0, np.intp)
    return np.repeat(np.arange(len(shards)), [len(shard.experts(ffn.num_experts)) for shard in shards])
