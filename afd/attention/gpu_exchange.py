"""Exchanges of an attention worker whose half computes on a GPU: nothing is sent before its stage is over.

`send` queues what the exchange needs behind the stage; `poll` looks whether the stage is over, sends then, and tells
the engine how long it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from afd.attention.exchange import Combined, Exchange, LocalExchange
from afd.model.cuda import LOOK_S, CudaDevice, Download
from afd.model.halves import Dispatch, FFNHalf
from afd.model.wire_format import encode_rows
from stepmesh.types import WireDtype

PATIENCE_S = 2e-3
"""Longest `poll` while a stage runs: the looks at the inner exchange end early on events that are not told apart."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage that was launched. download: rows in the wire's type, scales, expert ids and weights; or nothing."""

    step: int
    dispatch: Dispatch
    download: Download


class GpuExchange:
    """Around the exchange that does the sending. Main thread only.

    wire: type of rows between processes, which leave the GPU in it; None = the FFN halves are on the same GPU.
    on_sent: told of each stage that is over and sent: stream, seconds on the GPU.
    """

    def __init__(
        self,
        inner: Exchange,
        device: CudaDevice,
        wire: WireDtype | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._inner = inner
        self._device = device
        self._wire = wire
        self._clock = clock
        self._stages: dict[int, _Stage] = {}  # by stream
        self.on_sent: Callable[[int, float], None] = lambda stream, device_s: None

    @property
    def ready(self) -> bool:
        return self._inner.ready

    def send(self, stream: int, step: int, dispatch: Dispatch) -> None:
        """Within the stage that has made `dispatch`."""
        results: tuple[Tensor | None, ...] = ()
        if self._wire is not None:
            rows, scales = encode_rows(dispatch.rows, self._wire)
            results = (rows, scales, dispatch.expert_ids, dispatch.expert_weights)
        self._stages[stream] = _Stage(step, dispatch, self._device.download(results))

    def poll(self, timeout_s: float) -> list[Combined]:
        """As the inner one. PeerLostError also where a stage that is over cannot be sent any more."""
        self._send_finished()
        if not self._stages:
            return self._inner.poll(timeout_s)
        until_s = self._clock() + min(timeout_s, PATIENCE_S)
        while True:
            arrived = self._inner.poll(min(timeout_s, LOOK_S))
            self._send_finished()
            if arrived or not self._stages or self._clock() >= until_s:
                return arrived

    def has_news(self) -> bool:
        return self._inner.has_news()

    def idle(self, stream: int) -> None:
        self._inner.idle(stream)

    def cancel(self) -> None:
        self._stages.clear()
        self._inner.cancel()

    def close(self) -> None:
        self._stages.clear()
        self._inner.close()

    def _send_finished(self) -> None:
        for stream in [stream for stream, stage in self._stages.items() if stage.download.done()]:
            stage = self._stages.pop(stream)
            dispatch = stage.dispatch if self._wire is None else _on_host(stage)
            self._inner.send(stream, stage.step, dispatch)
            self.on_sent(stream, stage.download.device_s)


class GpuLocalExchange(LocalExchange):
    """FFN halves in this process and on its GPU, which `poll` waits for: there is nobody else to turn to."""

    def __init__(
        self, halves: Sequence[FFNHalf], device: CudaDevice, *, clock: Callable[[], float] = time.perf_counter
    ):
        super().__init__(halves, clock=clock)
        self._device = device

    def poll(self, timeout_s: float) -> list[Combined]:
        begun_s = self._clock()
        if not self._queue:
            return []
        with self._device.stage(self._queue[0][0]):
            [combined] = super().poll(timeout_s)
        self._device.synchronize()
        return [replace(combined, compute_s=self._clock() - begun_s)]


def _on_host(stage: _Stage) -> Dispatch:
    rows, scales, expert_ids, expert_weights = stage.download.tensors
    assert rows is not None
    return Dispatch(stage.dispatch.layer, rows, expert_ids, expert_weights, scales=scales)
