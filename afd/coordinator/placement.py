"""Which FFN rank owns which routed expert: contiguous, as even as possible, the first ranks take the rest."""

from __future__ import annotations


def expert_slices(num_experts: int, num_ranks: int) -> list[range]:
    """Experts of each FFN rank, [num_ranks]; a rank may own none when there are fewer experts than ranks."""
    if num_ranks < 1 or num_experts < 0:
        raise ValueError(f"cannot place {num_experts} experts on {num_ranks} ranks")
    share, rest = divmod(num_experts, num_ranks)
    slices = []
    start = 0
    for rank in range(num_ranks):
        stop = start + share + (1 if rank < rest else 0)
        slices.append(range(start, stop))
        start = stop
    return slices


def expert_ranks(num_experts: int, num_ranks: int) -> list[int]:
    """FFN rank of each expert, [num_experts], non-decreasing; empty for a dense model or without FFN ranks."""
    if num_experts == 0 or num_ranks == 0:
        return []
    return [rank for rank, owned in enumerate(expert_slices(num_experts, num_ranks)) for _ in owned]
