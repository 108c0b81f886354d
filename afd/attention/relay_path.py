"""Many layers a leg, with the exchanges between them: native calls over a lane of the mesh, for a step that is alone.

Whatever native code does not take goes through `python_path`, one layer at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import zip_longest

from torch import Tensor

from afd.attention.exchange import NO_GANG, Combined, Gang
from afd.attention.mesh_exchange import MeshExchange
from afd.attention.path import Fetch, Lap, Leg, Spans, Step
from afd.attention.python_path import PythonPath
from afd.relay.native import Relayed
from afd.relay.runs import AttentionRelay
from stepmesh.lane import Lane, Trips


class RelayPath:
    """A `LayerPath` around another one. layers: native code for the same half and cache; exchange: the one below."""

    launches = False

    def __init__(
        self,
        inner: PythonPath,
        layers: AttentionRelay,
        exchange: MeshExchange,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._inner = inner
        self._layers = layers
        self._exchange = exchange
        self._clock = clock
        self._late: tuple[int, int] | None = None  # stream and step: its answers take longer than polling is for

    @property
    def ready(self) -> bool:
        return self._inner.ready

    def stage(self, stream: int) -> AbstractContextManager[None]:
        return self._inner.stage(stream)

    def begin(self, step: Step, token_ids: Sequence[int]) -> Leg:
        """Layer 0 is computed and sent natively, and not waited for: meanwhile the engine has things to do."""
        if not self._takes(step):
            return self._inner.begin(step, token_ids)
        begun_s = self._clock()
        x = step.x = self._inner.embedded(token_ids)
        entered_s = self._clock()
        lane = self._exchange.begin_lane(step.stream, step.micro_batch.step, x.shape[0])
        done = None if lane is None else self._layers.begin(x, step.batch, lane)
        if lane is None or done is None or not done.num_laps:
            return self._inner.layer(step, begun_s, entered_s, ())
        return self._booked(step, lane, done, NO_GANG, begun_s, entered_s - begun_s)

    def resume(self, step: Step, answer: Combined) -> Leg:
        """Native code goes on as far as it gets. Where that is nowhere, Python computes the next layer."""
        if not self._takes(step) or (lane := self._exchange.lane(step.stream)) is None:
            return self._inner.resume(step, answer)
        done = self._layers.run(step.layer + 1, step.x, answer.partials, step.batch, lane)
        if not done.num_laps:
            return self._inner.resume(step, answer)
        if not done.on_time:
            self._late = step.stream, step.micro_batch.step
        return self._booked(step, lane, done, answer.gang._replace(tokens=done.gang_tokens), None, 0.0)

    def end(self, step: Step, answer: Combined) -> None:
        self._inner.end(step, answer)

    def fetch(self, stream: int, results: Sequence[Tensor]) -> Fetch | None:
        return self._inner.fetch(stream, results)

    def poll(self, timeout_s: float) -> list[Combined]:
        return self._inner.poll(timeout_s)

    def finished(self) -> list[Leg]:
        return self._inner.finished()

    def has_news(self) -> bool:
        return self._inner.has_news()

    def idle(self, stream: int) -> None:
        self._inner.idle(stream)

    def cancel(self) -> None:
        self._inner.cancel()

    def _takes(self, step: Step) -> bool:
        if not step.alone or (step.stream, step.micro_batch.step) == self._late:
            return False
        return self._layers.takes(step.layer + 1, step.batch.num_tokens)

    def _booked(self, step: Step, lane: Lane, done: Relayed, gang: Gang, begun_s: float | None, embed_s: float) -> Leg:
        """What native code did, told to the exchange. begun_s: when the embedding was, for embed_s; None = before."""

        def times() -> Iterator[tuple[float, float | None]]:
            laps = done.laps()
            return zip_longest(laps.posted_s.tolist(), laps.answered_s.tolist())

        self._exchange.book(lane, Trips(done.num_laps, done.num_answered, done.wait_s, done.ended_s, times))
        spans = Spans(
            done.began_s if begun_s is None else begun_s,
            done.ended_s,
            embed_s + done.compute_s + done.post_s,
            done.num_laps,
            partial(_laps, done, begun_s),
            done.num_answered,
            done.wait_s,
            done.ffn_s,
            done.exposed_s,
            done.open_wait_s,
            gang,
        )
        answer = Combined(step.stream, (), gang=gang) if done.num_answered == done.num_laps else None
        return Leg(step.stream, step.layer + 1, spans, answer)


def _laps(done: Relayed, begun_s: float | None) -> Iterator[Lap]:
    """begun_s: of the embedding before the first one, None = there was none."""
    for times in zip_longest(*(column.tolist() for column in done.laps())):
        yield Lap(begun_s, *times)
        begun_s = None
