"""The attention worker's stream loop where its half computes on a GPU.

The loop is `engine.AttentionEngine`'s; a stage is launched instead of computed, so the host goes on to the next ready
stream at once, and its rows are sent, or its logits sampled, when the GPU has come to their end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from afd.attention.engine import AttentionEngine, Output, Stream
from afd.attention.exchange import Combined
from afd.attention.gpu_exchange import GpuExchange
from afd.attention.head import Head
from afd.attention.stages import StageClock
from afd.kv.cache import KVCache
from afd.model.cuda import LOOK_S, CudaDevice, Download
from afd.model.device import to_device
from afd.model.graphs import DecodeGraphs
from afd.model.halves import AttentionBatch, AttentionHalf, Dispatch
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import BatchItem, MicroBatch


class GpuStageClock(StageClock):
    """Stages by the GPU's clock, booked when the host sees their end.

    The combine before a layer, and that before the head, are part of the stage. Waiting is what remains when no stage
    runs on the GPU.
    """

    def __init__(self, clock: Callable[[], float]):
        super().__init__(clock)
        self._running: dict[int, tuple[int, MicroBatch] | None] = {}  # by stream: layer and batch, None = the head
        self._unusual: set[int] = set()  # streams
        self._idle_since_s = 0.0

    def attention(
        self, stream: int, layer: int, batch: MicroBatch, begun_s: float, entered_s: float, computed_s: float
    ) -> float:
        """A layer was launched: see `sent`."""
        self._running[stream] = (layer, batch)
        return computed_s

    def sent(self, stream: int, device_s: float) -> float:
        """A launched layer took device_s, and its rows have just been sent."""
        entry = self._running.pop(stream)
        assert entry is not None, "the head sends nothing"
        self._idle_since_s = ended_s = self._clock()
        begun_s = ended_s - device_s
        return super().attention(stream, *entry, begun_s, begun_s, ended_s)

    def combined(self, stream: int, batch: MicroBatch, layer: int, begun_s: float, combined_s: float) -> None:
        """Booked with the head."""

    def head_launched(self, stream: int) -> None:
        """See `head_ended`."""
        self._running[stream] = None

    def head_ended(self, stream: int, device_s: float) -> float:
        """Its results are on the host -> when the head began."""
        del self._running[stream]
        self._idle_since_s = self._clock()
        return self._idle_since_s - device_s

    def looked_ahead(self, current: MicroBatch, num_tokens: int, begun_s: float) -> None:
        """Beside a stage on the GPU it takes no time of its own."""
        if not self._running:
            super().looked_ahead(current, num_tokens, max(begun_s, self._idle_since_s))

    def wait(self, begun_s: float, arrived: Sequence[Combined]) -> None:
        if not self._running:
            super().wait(max(begun_s, self._idle_since_s), arrived)

    def unusual(self, stream: int) -> None:
        """The step that is under way there takes what no other will: nobody shall learn from it."""
        self._unusual.add(stream)

    def _representative(self, stream: int) -> bool:
        unusual = stream in self._unusual
        self._unusual.discard(stream)
        return not unusual

    def reset(self) -> None:
        super().reset()
        self._running.clear()
        self._unusual.clear()


class GpuAttentionEngine(AttentionEngine):
    """exchange: told from here when a stage was sent.  graphs: for decodes; None = each layer is launched by itself.

    Main thread only, which holds torch.inference_mode().
    """

    def __init__(
        self,
        half: AttentionHalf,
        cache: KVCache,
        scheduler: Scheduler,
        exchange: GpuExchange,
        device: CudaDevice,
        *,
        graphs: DecodeGraphs | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(half, cache, scheduler, exchange, clock=clock)
        self._graphs = graphs
        self.stages = self._gpu_stages = GpuStageClock(clock)
        self._device = device
        self._sampling: dict[int, Download] = {}  # by stream: results of heads on their way
        self._slices_heads = False  # a launch delays nobody
        exchange.on_sent = self._sent

    def run_once(self, timeout_s: float) -> list[Output]:
        for idx, download in self._sampling.items():
            if download.done():
                return self._sample_and_commit(idx)
        return super().run_once(min(timeout_s, LOOK_S) if self._sampling else timeout_s)

    def fail(self) -> None:
        self._device.synchronize()  # what was launched still writes to blocks that others may get now
        self._sampling.clear()
        super().fail()

    def _batch_of(self, idx: int, items: Sequence[BatchItem]) -> AttentionBatch:
        with self._device.stage(idx):
            return super()._batch_of(idx, items)

    def _advance(self, idx: int, combined: Combined | None) -> list[Output]:
        with self._device.stage(idx):
            return super()._advance(idx, None if combined is None else self._placed(combined))

    def _layer(self, idx: int, stream: Stream, x: Tensor, partials: Sequence[Tensor]) -> Dispatch:
        if self._graphs is None or not self._graphs.takes(stream.batch):
            return super()._layer(idx, stream, x, partials)
        num_captured = self._graphs.num_captured
        stream.x, dispatch = self._graphs.layer(idx, stream.layer, x, stream.batch, partials)
        if self._graphs.num_captured > num_captured:
            self._gpu_stages.unusual(idx)
        return dispatch

    def _placed(self, combined: Combined) -> Combined:
        device, row_idx = self._half.device, combined.row_idx
        return replace(
            combined,
            partials=[to_device(partial, device) for partial in combined.partials],
            row_idx=None if row_idx is None else [to_device(places, device) for places in row_idx],
        )

    def _sent(self, idx: int, device_s: float) -> None:
        self._streams[idx].sent_s = self._gpu_stages.sent(idx, device_s)

    def _finish(self, idx: int, head: Head, begun_s: float) -> list[Output]:
        """Fetch what is sampled from; `run_once` looks for it."""
        if not head.seqs:
            return super()._finish(idx, head, begun_s)
        self._sampling[idx] = self._device.download(head.results)
        self._gpu_stages.head_launched(idx)
        return []

    def _sample_and_commit(self, idx: int) -> list[Output]:
        download, head = self._sampling.pop(idx), self._streams[idx].head
        assert head is not None
        head.results = [tensor for tensor in download.tensors if tensor is not None]
        return super()._finish(idx, head, self._gpu_stages.head_ended(idx, download.device_s))
