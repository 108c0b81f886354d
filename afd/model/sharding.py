"""How one FFN rank's share of every layer is cut: pure arithmetic, shared by loader, FFN half and planner."""

from __future__ import annotations

from dataclasses import dataclass

from afd.errors import ConfigError
from afd.model.spec import ModelSpec
from afd.types import FfnParallel


def partition(total: int, num_parts: int, part: int) -> range:
    """The `part`-th of `num_parts` contiguous, near-equal ranges of range(total); some are empty if total is small."""
    return range(total * part // num_parts, total * (part + 1) // num_parts)


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """The share of FFN rank `rank` of `num_ranks`. ShardSpec() is the whole model.

    Summed over the ranks, the partial rows give the whole FFN's rows, for every `parallel`.
    """

    rank: int = 0
    num_ranks: int = 1
    parallel: FfnParallel = FfnParallel.HYBRID

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(f"FFN rank {self.rank} is not among {self.num_ranks} ranks")

    def dense_slice(self, intermediate: int) -> range:
        """This rank's part of a dense FFN's intermediate dimension."""
        return partition(intermediate, self.num_ranks, self.rank)

    def shared_slice(self, intermediate: int) -> range:
        """This rank's part of the shared expert's intermediate dimension."""
        if self.parallel is FfnParallel.EP:
            return range(intermediate)
        return partition(intermediate, self.num_ranks, self.rank)

    def shared_expert_rows(self) -> tuple[int, int]:
        """(first, stride) of the rows for which this rank computes the shared expert."""
        return (self.rank, self.num_ranks) if self.parallel is FfnParallel.EP else (0, 1)

    def experts(self, num_experts: int) -> range:
        """The routed experts of which this rank holds weights."""
        if self.parallel is FfnParallel.TP:
            return range(num_experts)
        return partition(num_experts, self.num_ranks, self.rank)

    def expert_slice(self, intermediate: int) -> range:
        """This rank's part of the intermediate dimension of each expert that it holds."""
        if self.parallel is FfnParallel.TP:
            return partition(intermediate, self.num_ranks, self.rank)
        return range(intermediate)


def check_sparse(spec: ModelSpec, parallel: FfnParallel) -> None:
    """ConfigError where `cluster.dispatch = sparse` could leave no row out: every FFN rank works on every row."""
    if parallel is FfnParallel.TP:
        why, remedy = "cluster.ffn_parallel tp slices every expert over all ranks", "use ep, or dispatch broadcast"
    elif not spec.num_experts:
        why, remedy = f"{spec.name} has no MoE layer", "use broadcast"
    elif parallel is FfnParallel.HYBRID and any(layer.ffn.shared_intermediate for layer in spec.layers):
        why = f"cluster.ffn_parallel hybrid slices the shared expert of {spec.name} over all ranks"
        remedy = "use ep, or dispatch broadcast"
    else:
        return
    raise ConfigError(f"cluster.dispatch sparse: {why}, so each FFN rank needs every row; {remedy}")
