"""A GPU as a worker's loop uses it: one CUDA stream for each pipeline stream, results fetched without waiting.

A stage (what a worker computes between two exchanges) is launched on its pipeline stream's CUDA stream, then the
copies of its results to pinned host memory, then an event. The loop goes on and looks whether the event has completed;
nothing but `synchronize` blocks. The stages of one pipeline stream never overlap, so their copies need no CUDA stream
of their own: they delay nothing that could run, and those of other pipeline streams run beside them.

`stepmesh.gpu` is another thing: it lets a network card read a frame's rows out of GPU memory. Workers do not use it,
because a frame's routing and scales lie in host memory and the FFN's time goes into its header: all that is known only
when the stage is over. Unverified on hardware (docs/operations.md).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from afd.errors import DeviceError

LOOK_S = 50e-6
"""Longest block of a loop on anything else while a GPU computes, which rings no descriptor."""

DEADLINE_S = 30.0
"""Bound of one stage: far beyond any, the first one's loading of kernels included."""


class Download:
    """Results on their way to host memory. tensors: on the host, to be read once `done`.

    device_s: from the stage's beginning to the end of the copies, by the GPU's clock; it includes what other streams'
    stages took of the GPU meanwhile. Known once `done`.
    """

    def __init__(self, results: Sequence[Tensor], begun: torch.cuda.Event):
        self.tensors = [_begin_copy(result) for result in results]
        self.device_s = 0.0
        self._results = list(results)  # their memory is not anybody else's until the copies are over
        self._begun = begun
        self._ended = _event()
        self._deadline_s = time.monotonic() + DEADLINE_S

    def done(self) -> bool:
        """Look, never wait. DeviceError when the GPU does not come to an end."""
        if not self._ended.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > self._deadline_s:
                raise DeviceError(f"the GPU has not finished a stage within {DEADLINE_S:.0f} s; see dmesg, nvidia-smi")
            return False
        self.device_s = self._begun.elapsed_time(self._ended) / 1e3
        self._results.clear()
        return True


class CudaDevice:
    """torch's current GPU. Main thread only. Make it when weights and caches are loaded, for every stream to see."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._begun: torch.cuda.Event | None = None
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def stage(self, stream: int) -> Iterator[None]:
        """What is launched inside runs behind the other stages of this pipeline stream, beside those of others."""
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams[stream]):
            self._begun = _event()
            yield

    def download(self, results: Sequence[Tensor]) -> Download:
        """Queue copies of the stage's results behind it; call inside `stage`, once."""
        assert self._begun is not None, "downloads belong to a stage"
        return Download(results, self._begun)

    def synchronize(self) -> None:
        """Wait until everything launched so far is over."""
        torch.cuda.synchronize()

    def close(self) -> None:
        """Let what runs end; the device cannot be used afterwards. Idempotent."""
        with contextlib.suppress(RuntimeError):  # of a GPU that has failed: that was raised where it mattered
            torch.cuda.synchronize()
        self._streams.clear()


def _event() -> torch.cuda.Event:
    """An event behind what the current CUDA stream has queued."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _begin_copy(result: Tensor) -> Tensor:
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    return host.copy_(result, non_blocking=True)
