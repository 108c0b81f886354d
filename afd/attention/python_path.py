"""One layer a leg: computed by this thread, dispatched over an exchange (in this process, or a mesh)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from afd.attention.exchange import Combined, Exchange
from afd.attention.path import Fetch, Lap, Leg, Spans, Step
from afd.kv.cache import KVCache
from afd.model.halves import AttentionHalf
from afd.ops.device import to_device

_HERE = nullcontext()


class PythonPath:
    """A `LayerPath` on the CPU; its parts serve other paths. Main thread only."""

    launches = False

    def __init__(
        self,
        half: AttentionHalf,
        cache: KVCache,
        exchange: Exchange,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._half = half
        self._cache = cache
        self._exchange = exchange
        self._clock = clock

    @property
    def ready(self) -> bool:
        return self._exchange.ready

    def stage(self, stream: int) -> AbstractContextManager[None]:
        return _HERE

    def begin(self, step: Step, token_ids: Sequence[int]) -> Leg:
        begun_s = self._clock()
        step.x = self.embedded(token_ids)
        return self.layer(step, begun_s, self._clock(), ())

    def embedded(self, token_ids: Sequence[int]) -> Tensor:
        """The residual [n, hidden] float32 of tokens."""
        return embedded(self._half, token_ids)

    def resume(self, step: Step, answer: Combined) -> Leg:
        begun_s = self._clock()
        partials = combined_or_left(self._half, step, answer)
        return self.layer(step, begun_s, self._clock(), partials)

    def layer(self, step: Step, begun_s: float, entered_s: float, partials: Sequence[Tensor]) -> Leg:
        """The step's next layer, which adds `partials` first. begun_s, entered_s: of what came before it."""
        layer = step.layer + 1
        dispatch = self._half.layer(layer, step.x, step.batch, self._cache, partials)
        computed_s = self._clock()
        self._exchange.send(step.stream, step.micro_batch.step, dispatch)
        return leg_of_one(step.stream, layer, (begun_s, entered_s, computed_s, self._clock()))

    def end(self, step: Step, answer: Combined) -> None:
        self._half.combine(step.x, answer.partials, answer.row_idx)

    def fetch(self, stream: int, results: Sequence[Tensor]) -> Fetch | None:
        return None

    def poll(self, timeout_s: float) -> list[Combined]:
        return self._exchange.poll(timeout_s)

    def finished(self) -> list[Leg]:
        return []

    def has_news(self) -> bool:
        return self._exchange.has_news()

    def idle(self, stream: int) -> None:
        self._exchange.idle(stream)

    def cancel(self) -> None:
        self._exchange.cancel()


def embedded(half: AttentionHalf, token_ids: Sequence[int]) -> Tensor:
    """The residual [n, hidden] float32 of tokens, where the half computes."""
    return half.embed(to_device(torch.tensor(token_ids, dtype=torch.int64), half.device))


def combined_or_left(half: AttentionHalf, step: Step, answer: Combined) -> Sequence[Tensor]:
    """Partials that the next layer adds by itself; those of some rows only are added here, then none are left."""
    if answer.row_idx is None:
        return answer.partials
    half.combine(step.x, answer.partials, answer.row_idx)
    return ()


def leg_of_one(stream: int, layer: int, times: tuple[float, float, float, float], *, typical: bool = True) -> Leg:
    """A single layer, dispatched and not answered yet. times: begun, entered, computed, posted, as of a `Lap`."""
    begun_s, posted_s = times[0], times[3]
    spans = Spans(begun_s, posted_s, posted_s - begun_s, 1, partial(_only, times), typical=typical)
    return Leg(stream, layer, spans)


def _only(times: tuple[float, float, float, float]) -> Iterable[Lap]:
    return (Lap(*times, None),)
