"""One layer's round trip to the FFN: dispatch rows out, partial rows back. Two implementations, one contract.

`LocalExchange` runs FFN halves in this process (topology mono, reference, tests); `MeshExchange` sends over
stepmesh. The engine knows neither transport nor peers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from afd.model.halves import Dispatch, FFNHalf


class Gang(NamedTuple):
    """The attention workers whose rows were computed together. id, epoch: 0 where there is no gang."""

    tokens: int = 0
    """Rows of the merged batch."""
    size: int = 1
    id: int = 0
    epoch: int = 0


NO_GANG = Gang()


@dataclass(frozen=True, slots=True)
class Combined:
    """All partials of one exchange, in FFN rank order."""

    stream: int
    partials: Sequence[Tensor]
    """None at all where the residual has them already."""
    row_idx: Sequence[Tensor] | None = None
    """Rows of the micro-batch that each partial answers, [rows of it] int64; None = all of them, for all ranks."""
    gang: Gang = NO_GANG
    compute_s: float = 0.0
    """Seconds for which the slowest FFN rank computed."""
    local: bool = False
    """Computed in this process, inside `poll`."""


class Exchange(Protocol):
    """Called from the worker's main thread only."""

    @property
    def ready(self) -> bool:
        """True when every FFN rank of the epoch can be reached: only then may a step start."""

    def send(self, stream: int, step: int, dispatch: Dispatch) -> None:
        """Send one layer's rows to every FFN rank. The stream has no exchange in flight."""

    def poll(self, timeout_s: float) -> list[Combined]:
        """Completed exchanges in order of completion; returns early on any event. PeerLostError: see `cancel`."""

    def has_news(self) -> bool:
        """Whether `poll` would not have to wait: a look, which costs less than it does."""

    def idle(self, stream: int) -> None:
        """Tell the FFN ranks that this stream has nothing to run."""

    def cancel(self) -> None:
        """Forget every exchange in flight (an FFN rank was lost); late answers are dropped."""


class LocalExchange:
    """FFN halves in this process, run when polled (so that attention and FFN time stay apart in traces)."""

    def __init__(
        self,
        halves: Sequence[FFNHalf],
        *,
        around: Callable[[int], AbstractContextManager[None]] = lambda stream: nullcontext(),
        clock: Callable[[], float] = time.perf_counter,
    ):
        """around: entered with the stream whose rows are computed, and left when they are there."""
        self._halves = halves
        self._around = around
        self._clock = clock
        self._queue: deque[tuple[int, Dispatch]] = deque()

    @property
    def ready(self) -> bool:
        return True

    def send(self, stream: int, step: int, dispatch: Dispatch) -> None:
        self._queue.append((stream, dispatch))

    def poll(self, timeout_s: float) -> list[Combined]:
        if not self._queue:
            return []
        stream, dispatch = self._queue.popleft()
        begun_s = self._clock()
        with self._around(stream):
            partials = [half.layer(dispatch) for half in self._halves]
        num_tokens, took_s = int(dispatch.rows.shape[0]), self._clock() - begun_s
        return [Combined(stream, partials, gang=Gang(num_tokens), compute_s=took_s, local=True)]

    def has_news(self) -> bool:
        return bool(self._queue)

    def idle(self, stream: int) -> None:
        pass

    def cancel(self) -> None:
        self._queue.clear()
