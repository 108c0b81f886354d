"""A GPU under torch, in pure Python: `torch.cuda` and device tensors that behave like CUDA's as far as software can.

Tensors of "cuda" are CPU tensors of another class, which says so: reading one from the host raises, and so do mixing it
with a host tensor, copying from or to memory that is not pinned, and using it on a stream that does not know that it
has been made. A copy to the host brings garbage until its event has completed, which takes some looks. What a graph
captures is not computed: it changes nothing, its results are garbage until the graph is replayed.

It does not model time, memory and its limits, more than one device, the rounding of CUDA's own kernels, or a GPU that
fails: what depends on those is seen on a real one only (`make test-gpu`).
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
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}  # and all that end with "_"
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


class FakeGraph:
    """Calls in order, with the very tensors that they read and wrote."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self._inputs: dict[int, Tensor] = {}  # by id: made before
        self._results: dict[int, Tensor] = {}  # by id
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # by address of the storage: its bytes, and a copy of them

    def before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call is about to be captured."""
        if FakeCuda.here().num_captures > FakeCuda.here().most_captures:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {name}")
        written = [kwargs["out"]] if "out" in kwargs else []
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            written.append(args[0])
        for tensor in written:
            storage = _bytes_of(tensor)
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._inputs.update((id(tensor), tensor) for tensor in read if id(tensor) not in self._results)
        known = {_bytes_of(tensor).data_ptr() for tensor in read}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._results.update((id(tensor), tensor) for tensor in made)
        fresh = [None if _bytes_of(tensor).data_ptr() in known else tensor for tensor in made]
        self._calls.append((func, args, kwargs, fresh))

    def end(self) -> None:
        """Nothing has happened."""
        for storage, content in self._before.values():
            storage.copy_(content)
        for tensor in (tensor for *_, fresh in self._calls for tensor in fresh if tensor is not None):
            if tensor.dtype is not torch.bool:
                _bytes_of(tensor).fill_(0xFF)

    def replay(self) -> None:
        gpu = FakeCuda.here()
        gpu.num_replays += 1
        _check(gpu, "replay", list(self._inputs.values()))
        with torch._C.DisableTorchFunctionSubclass():
            for func, args, kwargs, fresh in self._calls:
                result = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for kept, new in zip(fresh, result, strict=True):
                    if kept is not None:
                        kept.copy_(new)
        _made_here(gpu, list(self._results.values()))


def _bytes_of(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@contextlib.contextmanager
def _capture(graph: FakeGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"):
    gpu = FakeCuda.here()
    assert stream is gpu.stream and gpu.capturing is None
    gpu.synchronize()
    gpu.num_captures += 1
    gpu.capturing = graph
    try:
        yield
    except RuntimeError:  # the end of the capture raises, too, and hides it
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
    finally:
        gpu.capturing = None
        graph.end()


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing

    def record(self) -> None:
        here = FakeCuda.here()
        here.must_not_capture("an event")
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
    """One thread's view of the GPU, as a process has it.

    looks: how many an event takes.
    may_wait: see `_WAITS`.
    """

    _threads = threading.local()

    def __init__(self, looks: int = 3, may_wait: bool = False) -> None:
        self.looks = looks
        self.may_wait = may_wait
        self.loading = True  # weights are copied to the GPU and waited for
        self.streams: list[FakeStream] = []
        self.num_events = self.num_looks = self.num_uploads = self.num_downloads = self.num_waits = 0
        self.num_captures = self.num_replays = 0
        self.most_captures = 1 << 30  # the next one fails
        self.capturing: FakeGraph | None = None

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

    def must_not_capture(self, what: str) -> None:
        if self.capturing is not None:
            raise GpuMisuseError(f"{what} within a graph")

    def synchronize(self) -> None:
        self.must_not_capture("waiting")
        self.loading = False  # as an engine does once, when all is there
        for stream in self.streams:
            stream.run(stream.num_launched)


def install(monkeypatch) -> None:
    """torch.cuda is the fake's; threads use it within `FakeCuda().entered()`."""
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (8 << 30, 8 << 30),
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": lambda stream: FakeCuda.here().on(stream),
        "CUDAGraph": FakeGraph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, 0),
        "current_stream": lambda: FakeCuda.here().stream,
        "synchronize": lambda: FakeCuda.here().synchronize(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


class GpuTensor(Tensor):
    """A device tensor.  made: the stream it was made on, and its place there; None = long ago."""

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
        if gpu.capturing is not None:
            gpu.capturing.before(name, args, kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if gpu.capturing is not None:
            gpu.capturing.record(func, args, kwargs, result)
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
            result = func(*args, **kwargs).as_subclass(GpuTensor)
            if gpu.capturing is not None:
                gpu.capturing.record(func, args, kwargs, result)
            return _made_here(gpu, result)
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _upload(gpu: FakeCuda, host: Tensor, non_blocking: bool = False) -> Tensor:
    if not gpu.loading and not (non_blocking and getattr(host, "is_pinned_here", False)):
        raise GpuMisuseError("a copy to the GPU that the host would wait for")
    gpu.must_not_capture("a copy from the host")
    gpu.num_uploads += 1
    return _made_here(gpu, host.clone().as_subclass(GpuTensor))


def _download(gpu: FakeCuda, target: Tensor, source: GpuTensor, non_blocking: bool = False) -> Tensor:
    if not non_blocking or not getattr(target, "is_pinned_here", False):
        raise GpuMisuseError("a copy from the GPU that the host would wait for")
    gpu.must_not_capture("a copy to the host")
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
