"""One batch a leg, computed by a GPU beside this thread.

A batch is launched, and answered when it is over. Meanwhile the loop takes dispatches, and launches what is complete of
other pipeline streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from afd.ffn.gang import GangBatch
from afd.ffn.path import Leg
from afd.ffn.python_path import BatchRows, answer, leg_of_one
from afd.model.cuda import CudaDevice, Download
from afd.model.halves import FFNHalf
from afd.ops.device import to_device
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.tensor import to_numpy


class GpuPath:
    """A `BatchPath`. Times are the GPU's; where batches of several streams ran at once, that time is booked once."""

    def __init__(
        self,
        half: FFNHalf,
        mesh: Mesh,
        layout: PayloadLayout,
        device: CudaDevice,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._rows = BatchRows(half, layout, self._place)
        self._mesh = mesh
        self._device = device
        self._clock = clock
        self._running: dict[Download, GangBatch] = {}
        self._booked_until_s = 0.0

    @property
    def computing(self) -> bool:
        return bool(self._running)

    def run(self, batch: GangBatch) -> None:
        with self._device.stage(batch.stream):
            self._running[self._device.download((self._rows.of(batch),))] = batch

    def go_on(self) -> None:
        return None

    def finished(self) -> list[Leg]:
        over = [download for download in self._running if download.done()]
        return [self._answered(self._running.pop(download), download) for download in over]

    def _answered(self, batch: GangBatch, download: Download) -> Leg:
        [rows] = download.tensors
        computed_s = self._clock()
        begun_s = max(computed_s - download.device_s, self._booked_until_s)
        self._booked_until_s = computed_s
        answer(self._mesh, batch, to_numpy(rows), computed_s - begun_s)
        return leg_of_one(batch, begun_s, computed_s, self._clock())

    def _place(self, rows: Tensor) -> Tensor:
        return to_device(rows, self._device.torch_device)
