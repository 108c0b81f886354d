"""The next step's inputs, prepared while the rows of the current one are away.

Which tokens come next is not known before they are sampled, but whose they will be is, and where they go: all of a
decode step but the embedding. What was foreseen is used if that is what the scheduler then asks for, else forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from afd.model.batch import AttentionBatch
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import BatchItem, MicroBatch

_Identity = list[tuple[object, int, int, int, int, int]]


class LookAhead:
    """One of each engine.

    build: the batch of (stream, items).
    """

    def __init__(self, scheduler: Scheduler, build: Callable[[int, Sequence[BatchItem]], AttentionBatch]):
        self._scheduler = scheduler
        self._build = build
        self._next: dict[int, tuple[_Identity, AttentionBatch] | None] = {}  # None: looked, nothing is certain

    def has_seen(self, current: MicroBatch) -> bool:
        """Whether `prepare` has looked for what follows `current`."""
        return current.stream in self._next

    def prepare(self, current: MicroBatch) -> int:
        """Look for what follows `current`: the number of tokens for which all is ready, 0 if nothing is certain."""
        items = self._scheduler.foresee(current)
        self._next[current.stream] = None
        if items is None:
            return 0
        self._next[current.stream] = _identity(items), self._build(current.stream, items)
        return len(items)

    def batch(self, begun: MicroBatch) -> AttentionBatch:
        """The batch of a step that begins: the one that was prepared, if that is what begins."""
        foreseen = self._next.pop(begun.stream, None)
        if foreseen is not None and foreseen[0] == _identity(begun.items):
            return foreseen[1]
        return self._build(begun.stream, begun.items)

    def reset(self) -> None:
        """The steps in flight were lost."""
        self._next.clear()


def _identity(items: Iterable[BatchItem]) -> _Identity:
    """Equal for two batches of the same tokens that see the same blocks.

    A sequence's blocks become more, and change by preemption only; but that some behind the window are dropped, which
    no token sees, whatever is in them by then.
    """
    return [
        (
            item.seq,
            item.start,
            item.num_new,
            item.seq.num_preempted,
            len(item.seq.blocks),
            len(item.seq.window_blocks),
        )
        for item in items
    ]
