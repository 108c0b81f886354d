"""Which rank a newcomer gets, and who takes over a place that has become free. Pure.

FFN ranks below the number of FFN ranks are shards of the model. Those above are places on standby: such a worker holds
every shard, computes nothing, and is given the rank of one that is lost.
"""

from __future__ import annotations

from collections.abc import Iterable

from afd.coordinator.claims import RefusedError
from afd.coordinator.members import FFN, GATEWAY, Entry
from afd.messages.membership import WorkerInfo


def free_rank(info: WorkerInfo, entries: Iterable[Entry], size: int, num_standby: int) -> int:
    """The rank asked for, the lowest free one, or one on standby; RefusedError when taken, out of range or full.

    size: ranks of the newcomer's role.
    num_standby: of FFN workers; 0 for the other roles.
    """
    holders = {entry.rank: entry for entry in entries if entry.info.role == info.role}
    free = [rank for rank in range(size + num_standby) if rank not in holders]
    if info.rank >= size + num_standby:
        more = f", and {num_standby} on standby" if num_standby else ""
        raise RefusedError(
            f"rank {info.rank} asked for, but {info.role} ranks end at {size - 1}{more} in this topology"
        )
    if info.rank in free and info.role != GATEWAY:
        return info.rank
    if info.rank < 0 or info.role == GATEWAY or num_standby:
        # Who is there for a place on standby does not get a shard's: that is being loaded, or taken over.
        wanted = [rank for rank in free if info.rank < size or rank >= size]
        if wanted:
            return wanted[0]
        raise RefusedError(f"all {size + num_standby} {info.role} ranks are taken", retry=True)
    holder = holders[info.rank]
    raise RefusedError(
        f"rank {info.rank} is held by another {info.role} worker ({holder.info.host}, pid {holder.info.pid})",
        retry=True,
    )


def take_over(entries: Iterable[Entry], num_ffn: int) -> list[tuple[str, Entry]]:
    """Give the free shards to FFN workers that are ready on standby -> the former name of each, and its entry."""
    workers = [entry for entry in entries if entry.info.role == FFN]
    held = {entry.rank for entry in workers}
    spare = sorted((w for w in workers if w.rank >= num_ffn and w.ready), key=lambda worker: worker.rank)
    promoted = []
    for rank in range(num_ffn):
        if rank not in held and spare:
            worker = spare.pop(0)
            promoted.append((worker.name, worker))
            worker.take_over(rank)
    return promoted
