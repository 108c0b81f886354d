"""The FFN worker's loop where its half computes on a GPU: batches are launched, and answered when they are over.

Meanwhile the loop takes dispatches, and launches what is complete of other pipeline streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from afd.ffn.engine import FFNEngine
from afd.ffn.gang import GangBatch, GangTable
from afd.model.cuda import LOOK_S, CudaDevice, Download
from afd.model.device import to_device
from afd.model.halves import FFNHalf
from afd.model.wire_format import decode_rows
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.tensor import to_numpy, to_torch
from stepmesh.types import DispatchParts


class GpuFFNEngine(FFNEngine):
    """Times are the GPU's; where batches of several streams ran at once, that time is booked once.

    Main thread only, which holds torch.inference_mode().
    """

    def __init__(
        self,
        half: FFNHalf,
        mesh: Mesh,
        gangs: GangTable,
        device: CudaDevice,
        *,
        layout: PayloadLayout,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(half, mesh, gangs, layout=layout, clock=clock)
        self._device = device
        self._running: dict[Download, GangBatch] = {}
        self._booked_until_s = 0.0

    @property
    def _computing(self) -> bool:
        return bool(self._running)

    def _take_events(self, timeout_s: float) -> float:
        blocked_s = super()._take_events(min(timeout_s, LOOK_S) if self._running else timeout_s)
        for download in [download for download in self._running if download.done()]:
            self._answer_finished(self._running.pop(download), download)
        return blocked_s

    def _compute(self, batch: GangBatch) -> None:
        with self._device.stage(batch.stream):
            self._running[self._device.download((self._answer_rows(batch),))] = batch

    def _answer_finished(self, batch: GangBatch, download: Download) -> None:
        [rows] = download.tensors
        assert rows is not None
        done_s = self._clock()
        begun_s = max(done_s - download.device_s, self._booked_until_s)
        self._booked_until_s = done_s
        self._answer(batch, to_numpy(rows), begun_s, done_s)

    def _rows(self, parts: DispatchParts) -> Tensor:
        """One member's rows on the GPU. Routing stays on the host: see `Dispatch`."""
        rows = to_device(to_torch(parts.rows, self._layout.dispatch_dtype), self._device.torch_device)
        scales = None if parts.scales is None else to_device(torch.from_numpy(parts.scales), self._device.torch_device)
        return decode_rows(rows, scales, self._half.dtype)
