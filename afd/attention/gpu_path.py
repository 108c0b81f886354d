"""One layer a leg, computed by a GPU beside this thread.

A layer is launched, so the loop goes on to the next ready stream at once; its rows are sent when `poll` finds that the
GPU has come to their end, and `finished` has the leg then, with the GPU's own times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from afd.attention.exchange import Combined, Exchange
from afd.attention.path import Leg, Step
from afd.attention.python_path import combined_or_left, embedded, leg_of_one
from afd.kv.cache import KVCache
from afd.model.cuda import LOOK_S, CudaDevice, Download
from afd.model.graphs import DecodeGraphs
from afd.model.halves import AttentionHalf, Dispatch
from afd.model.wire_format import encode_rows
from afd.ops.device import to_device
from stepmesh.types import WireDtype

PATIENCE_S = 2e-3
"""Longest `poll` while anything is launched: the inner poll may return early for events that are no answers."""

WIRE_PARTS = ("rows", "scales", "expert_ids", "expert_weights")
"""Fields of a `Dispatch` that leave this process."""


@dataclass(frozen=True, slots=True)
class _Launch:
    """A layer on the GPU."""

    step: Step
    dispatch: Dispatch
    """What it computes, in the GPU's memory."""
    parts: tuple[str, ...]
    """Fields of the dispatch that are downloaded."""
    download: Download
    typical: bool


class GpuPath:
    """A `LayerPath`; the half, its cache and the graphs are on `device`."""

    launches = True

    def __init__(
        self,
        half: AttentionHalf,
        cache: KVCache,
        exchange: Exchange,
        device: CudaDevice,
        *,
        wire: WireDtype | None,
        graphs: DecodeGraphs | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """wire: type of rows between processes, in which they leave the GPU; None = the FFN halves are on the same GPU.

        graphs: for decodes; None = each kernel is launched by itself.
        """
        self._half = half
        self._cache = cache
        self._exchange = exchange
        self._device = device
        self._wire = wire
        self._graphs = graphs
        self._clock = clock
        self._launched: dict[int, _Launch] = {}  # by stream
        self._heads: list[Download] = []
        self._finished: list[Leg] = []

    @property
    def ready(self) -> bool:
        return self._exchange.ready

    def stage(self, stream: int) -> AbstractContextManager[None]:
        return self._device.stage(stream)

    def begin(self, step: Step, token_ids: Sequence[int]) -> None:
        step.x = embedded(self._half, token_ids)
        self._launch(step, ())

    def resume(self, step: Step, answer: Combined) -> None:
        self._launch(step, combined_or_left(self._half, step, self._placed(answer)))

    def end(self, step: Step, answer: Combined) -> None:
        placed = self._placed(answer)
        self._half.combine(step.x, placed.partials, placed.row_idx)

    def fetch(self, stream: int, results: Sequence[Tensor]) -> Download:
        self._heads.append(self._device.download(results))
        return self._heads[-1]

    def poll(self, timeout_s: float) -> list[Combined]:
        """PeerLostError also where a layer that is over cannot be sent any more."""
        if not self._computing():
            return self._exchange.poll(timeout_s)
        until_s = self._clock() + min(timeout_s, PATIENCE_S)
        num_heads = len(self._heads)
        while True:
            arrived = self._exchange.poll(min(timeout_s, LOOK_S))
            if not self._computing() or arrived or len(self._heads) < num_heads or self._clock() >= until_s:
                return arrived

    def finished(self) -> list[Leg]:
        finished, self._finished = self._finished, []
        return finished

    def has_news(self) -> bool:
        return self._exchange.has_news()

    def idle(self, stream: int) -> None:
        self._exchange.idle(stream)

    def cancel(self) -> None:
        self._device.synchronize()  # what was launched still writes to blocks that others may get now
        self._launched.clear()
        self._heads.clear()
        self._finished.clear()
        self._exchange.cancel()

    def _launch(self, step: Step, partials: Sequence[Tensor]) -> None:
        """The step's next layer, and copies of what the exchange needs behind it."""
        layer, graphs, num_captured = step.layer + 1, self._graphs, 0
        if graphs is None or not graphs.takes(step.batch):
            dispatch = self._half.layer(layer, step.x, step.batch, self._cache, partials)
        else:
            num_captured = -graphs.num_captured
            step.x, dispatch = graphs.layer(step.stream, layer, step.x, step.batch, partials)
            num_captured += graphs.num_captured
        parts: dict[str, Tensor] = {}
        if self._wire is not None:
            rows, scales = encode_rows(dispatch.rows, self._wire)
            dispatch = replace(dispatch, rows=rows, scales=scales)
            parts = {name: part for name in WIRE_PARTS if (part := getattr(dispatch, name)) is not None}
        download = self._device.download(list(parts.values()))
        # A capture waits for the GPU, which later steps do not.
        typical = num_captured == 0
        self._launched[step.stream] = _Launch(step, dispatch, tuple(parts), download, typical)

    def _computing(self) -> bool:
        """Send what the GPU has come to the end of; whether it computes anything else."""
        for stream in [stream for stream, launch in self._launched.items() if launch.download.done()]:
            self._send(self._launched.pop(stream))
        self._heads = [head for head in self._heads if not head.done()]
        return bool(self._launched or self._heads)

    def _send(self, launch: _Launch) -> None:
        step = launch.step
        on_host: dict[str, Any] = dict(zip(launch.parts, launch.download.tensors, strict=True))
        dispatch = replace(launch.dispatch, **on_host)
        self._exchange.send(step.stream, step.micro_batch.step, dispatch)
        sent_s = self._clock()
        begun_s = sent_s - launch.download.device_s
        times = (begun_s, begun_s, sent_s, sent_s)
        self._finished.append(leg_of_one(step.stream, dispatch.layer, times, typical=launch.typical))

    def _placed(self, answer: Combined) -> Combined:
        """The answer's rows on the GPU."""
        device, row_idx = self._half.device, answer.row_idx
        return replace(
            answer,
            partials=[to_device(partial, device) for partial in answer.partials],
            row_idx=None if row_idx is None else [to_device(places, device) for places in row_idx],
        )


def computed_here(device: CudaDevice) -> Callable[[int], AbstractContextManager[None]]:
    """`around` of a `LocalExchange` with its halves on the GPU, which it waits for: there is nobody else to turn to."""

    @contextmanager
    def around(stream: int) -> Iterator[None]:
        with device.stage(stream):
            yield
        device.synchronize()

    return around
