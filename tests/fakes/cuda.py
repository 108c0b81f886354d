"""A GPU under torch, in pure Python: `torch.cuda` and device tensors that behave like CUDA's as far as software can.

Tensors of "cuda" are CPU tensors of another class, which says so: reading one from the host raises, and so do mixing it
with a host tensor, copying from or to memory that is not pinned, and using it on a stream that does not know that it
has been made. A copy to the host brings garbage until its event has completed, which takes some looks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
_TO_HOST = {"tolist", "item", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__", "equal"}
_WAITS = {*_TO_HOST, "nonzero", "bincount", "unique", "masked_select"}
_FORBIDDEN = {"numpy", "__array__", "data_ptr"}
_PROPERTIES = {"device": GPU, "is_cpu": False, "is_cuda": True}


class GpuMisuseError(AssertionError):
    """What CUDA would refuse, wait for, or silently get wrong."""


class FakeStream:
    """Copies to the host run when an event behind them completes."""

    def __init__(self) -> None:
        self.num_launched = 0
        self.num_over = 0  # of those launched: the host knows
        self._copies: deque[tuple[int, Tensor, Tensor]] = deque()
        FakeCuda.here().streams.append(self)

    def launch(self) -> int:
        self.num_launched += 1
        return self.num_launched

    def copy_later(self, target: Tensor, content: Tensor) -> None:
        target.view(torch.uint8).fill_(0xFF)
        self._copies.append((self.launch(), target, content))

    def run(self, until: int) -> None:
        while self._copies and self._copies[0][0] <= until:
            _, target, content = self._copies.popleft()
            target.copy_(content)
        self.num_over = max(self.num_over, until)


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing

    def record(self) -> None:
        here = FakeCuda.here()
        here.num_events += 1
        self._stream, self._place = here.stream, here.stream.launch()
        self._looks_left, self._at_s = here.looks, time.perf_counter()

    def query(self) -> bool:
        FakeCuda.here().num_looks += 1
        self._looks_left -= 1
        if self._looks_left <= 0:
            self._stream.run(self._place)
        return self._stream.num_over >= self._place

    def elapsed_time(self, end: FakeEvent) -> float:
        for event in (self, end):
            if not event._timed or event._stream.num_over < event._place:
                raise GpuMisuseError("the time of an event that is not over, or not timed")
        return (end._at_s - self._at_s) * 1e3


class FakeCuda:
    """One thread's view of the GPU, as a process has it.  looks: how many an event takes.  may_wait: see `_WAITS`."""

    _threads = threading.local()

    def __init__(self, looks: int = 3, may_wait: bool = False) -> None:
        self.looks = looks
        self.may_wait = may_wait
        self.loading = True  # weights are copied to the GPU and waited for
        self.streams: list[FakeStream] = []
        self.num_events = self.num_looks = self.num_uploads = self.num_downloads = self.num_waits = 0

    @classmethod
    def here(cls) -> FakeCuda:
        return cls._threads.gpu

    @contextlib.contextmanager
    def entered(self):
        """torch has this GPU in this thread."""
        previous = getattr(self._threads, "gpu", None)
        self._threads.gpu = self
        if not self.streams:
            self.stream = FakeStream()
        try:
            with _Factories():
                yield self
        finally:
            self._threads.gpu = previous

    @contextlib.contextmanager
    def on(self, stream: FakeStream):
        previous, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = previous

    def synchronize(self) -> None:
        self.loading = False  # as an engine does once, when all is there
        for stream in self.streams:
            stream.run(stream.num_launched)


def install(monkeypatch) -> None:
    """torch.cuda is the fake's; threads use it within `FakeCuda().entered()`."""
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": lambda stream: FakeCuda.here().on(stream),
        "synchronize": lambda: FakeCuda.here().synchronize(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


class GpuTensor(Tensor):
    """made: the stream it was made on, and its place there; None = long ago."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            prop = func.__self__.__name__
            return _PROPERTIES[prop] if prop in _PROPERTIES else super().__torch_function__(func, types, args, kwargs)
        gpu = FakeCuda.here()
        if name in _FORBIDDEN:
            raise GpuMisuseError(f"{name} of a GPU tensor")
        if name in _WAITS:
            if not gpu.may_wait:
                raise GpuMisuseError(f"{name} of a GPU tensor makes the host wait")
            gpu.num_waits += 1
        if name in _TO_HOST:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        if name == "copy_" and not isinstance(args[0], cls):
            return _download(gpu, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not (gpu.loading and name in ("copy_", "__setitem__")):
            _check(gpu, name, tensors)
        result = super().__torch_function__(func, types, args, kwargs)
        return result if name == "__setitem__" else _made_here(gpu, result)


class _Factories(TorchFunctionMode):
    """What makes a GPU tensor or pinned memory out of nothing or of a host tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpu = FakeCuda.here()
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if func is Tensor.to and not isinstance(args[0], GpuTensor) and _is_gpu(args[1]):
            return _upload(gpu, args[0], **kwargs)
        if kwargs.pop("pin_memory", False):
            pinned = func(*args, **kwargs)
            pinned.is_pinned_here = True
            return pinned
        if "device" in kwargs and _is_gpu(kwargs["device"]):
            kwargs["device"] = "cpu"
            return _made_here(gpu, func(*args, **kwargs).as_subclass(GpuTensor))
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _upload(gpu: FakeCuda, host: Tensor, non_blocking: bool = False) -> Tensor:
    if not gpu.loading and not (non_blocking and getattr(host, "is_pinned_here", False)):
        raise GpuMisuseError("a copy to the GPU that the host would wait for")
    gpu.num_uploads += 1
    return _made_here(gpu, host.clone().as_subclass(GpuTensor))


def _download(gpu: FakeCuda, target: Tensor, source: GpuTensor, non_blocking: bool = False) -> Tensor:
    if not non_blocking or not getattr(target, "is_pinned_here", False):
        raise GpuMisuseError("a copy from the GPU that the host would wait for")
    _check(gpu, "copy_", [source])
    gpu.num_downloads += 1
    gpu.stream.copy_later(target, source.as_subclass(Tensor).clone())
    return target


def _check(gpu: FakeCuda, name: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not isinstance(tensor, GpuTensor):
            if tensor.dim():
                raise GpuMisuseError(f"{name} mixes host and GPU tensors")
            continue
        stream, place = getattr(tensor, "made", (gpu.stream, 0))
        if stream is not gpu.stream and place > stream.num_over:
            raise GpuMisuseError(f"{name} takes what another stream has not finished")


def _made_here(gpu: FakeCuda, result: Any) -> Any:
    place = gpu.stream.launch()
    for tensor in tree_leaves(result):
        if isinstance(tensor, GpuTensor):
            tensor.made = (gpu.stream, place)
    return result
