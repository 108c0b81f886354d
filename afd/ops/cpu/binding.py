"""The kernels of the C++ library `_native`, loaded with ctypes (which releases the GIL during a call)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.ops.cpu import sampling as native_sampling
from afd.ops.cpu.packed import PAIRS, QUADS, Packed, PackedInt8, PackedMatrix
from afd.ops.ops import RowMax
from afd.ops.sample_rows import SampledRows, SampleRow

_ABI_VERSION = 9
_POST_FAILED = 1000  # + errno
ISAS = ("portable", "avx2", "avx512")
"""Instruction sets, slowest first; the position is the number the library knows them by."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


class Matrix(ctypes.Structure):
    """AfdMatrix of src/api.h. It does not keep the matrix alive."""

    _fields_ = (("data", c_void_p), ("scales", c_void_p))


class KernelsUnavailableError(RuntimeError):
    """The native library is missing, of another version, or the processor lacks what was asked for."""


class NativeKernels:
    """Implements `base.Kernels` for one instruction set. Stateless but for the library's worker threads."""

    def __init__(self, library: ctypes.CDLL, isa: str) -> None:
        self.name = isa
        self.library = library
        self.isa = ISAS.index(isa)
        self.int8_order = QUADS if isa == "avx512" else PAIRS

    def matrix(self, packed: Packed | None) -> Matrix:
        """Null pointers for None. ValueError for one that was packed for another instruction set."""
        if packed is None:
            return Matrix(None, None)
        if isinstance(packed, PackedInt8) and packed.order != self.int8_order:
            raise ValueError(f"{self.name} multiplies int8 weights as {self.int8_order}, not as {packed.order}")
        return Matrix(packed.data.data_ptr(), packed.scales.data_ptr() if isinstance(packed, PackedInt8) else None)

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        scale: float,
        window: int,
        out: Tensor,
        num_threads: int,
    ) -> None:
        num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
        detail = (c_int32 * 2)()
        status = self.library.afd_paged_attention(
            self.isa,
            num_threads,
            DTYPE_CODES[q.dtype],
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            query_start.data_ptr(),
            q.stride(0),
            out.stride(0),
            block_table.shape[1],
            q.shape[0],
            seq_lens.shape[0],
            q.shape[1],
            num_kv_heads,
            head_dim,
            v_cache.shape[3],
            num_blocks,
            block_size,
            window,
            scale,
            detail,
        )
        if status:
            raise error_of(status, detail[0], detail[1])

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
        detail = (c_int32 * 2)()
        status = self.library.afd_write_kv(
            self.isa,
            DTYPE_CODES[k.dtype],
            k.data_ptr(),
            v.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            k.stride(0),
            v.stride(0),
            k.shape[0],
            num_kv_heads,
            head_dim,
            v_cache.shape[3],
            num_blocks,
            block_size,
            detail,
        )
        if status:
            raise error_of(status, detail[0], detail[1])

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
        detail = (c_int32 * 2)()
        status = self.library.afd_rope_write_kv(
            self.isa,
            DTYPE_CODES[q.dtype],
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            q.shape[0],
            q.shape[1],
            num_kv_heads,
            head_dim,
            v_cache.shape[3],
            cos.shape[1],
            interleaved,
            num_blocks,
            block_size,
            detail,
        )
        if status:
            raise error_of(status, detail[0], detail[1])

    def add_rms_norm(self, x: Tensor, partials: Sequence[Tensor], weight: Tensor, eps: float, out: Tensor) -> None:
        pointers = (c_void_p * len(partials))(*[partial.data_ptr() for partial in partials])
        partial_dtype = partials[0].dtype if partials else x.dtype
        self.library.afd_add_rms_norm(
            self.isa,
            DTYPE_CODES[x.dtype],
            DTYPE_CODES[out.dtype],
            DTYPE_CODES[partial_dtype],
            x.data_ptr(),
            pointers,
            len(partials),
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            eps,
        )

    def silu_mul(self, gate_up: Tensor, limit: float, out: Tensor) -> None:
        self.library.afd_silu_mul(
            self.isa,
            DTYPE_CODES[out.dtype],
            gate_up.data_ptr(),
            out.data_ptr(),
            gate_up.stride(0),
            out.stride(0),
            out.shape[0],
            out.shape[1],
            limit,
        )

    def row_max(self, x: Tensor, out: RowMax, num_threads: int) -> None:
        rows, width = x.shape
        largest, idx = out.largest.data_ptr(), out.idx.data_ptr()
        self.library.afd_row_max(self.isa, num_threads, x.data_ptr(), x.stride(0), rows, width, largest, idx)

    def sample(self, logits: Tensor, rows: Sequence[SampleRow], num_threads: int) -> SampledRows:
        return native_sampling.sample(self.library, self.isa, logits, rows, num_threads)

    def pack(self, w: Tensor, *, unpack: bool = False) -> None:
        """Reorder w [n, k] in its place."""
        self.library.afd_pack(w.data_ptr(), w.shape[0], w.shape[1], unpack)

    def unpack_rows(self, w: PackedMatrix, idx: Tensor, out: Tensor, num_threads: int) -> None:
        """out [m, k] float32: rows idx of w."""
        self.library.afd_unpack_rows(
            num_threads,
            w.data.data_ptr(),
            *w.shape,
            idx.data_ptr(),
            idx.shape[0],
            out.data_ptr(),
        )

    def gemm(self, x: Tensor, w: Packed, out: Tensor, num_threads: int) -> None:
        rows, columns = w.shape
        status = self.library.afd_gemm(
            self.isa,
            num_threads,
            x.data_ptr(),
            ctypes.byref(self.matrix(w)),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            x.stride(0),
            out.stride(0),
            x.shape[0],
            rows,
            columns,
        )
        if status:
            raise error_of(status, 0, 0)

    def gemm_row_max(self, x: Tensor, w: Packed, best: RowMax, start: int, stop: int, num_threads: int) -> None:
        status = self.library.afd_gemm_row_max(
            self.isa,
            num_threads,
            x.data_ptr(),
            ctypes.byref(self.matrix(w)),
            best.largest.data_ptr(),
            best.idx.data_ptr(),
            x.stride(0),
            x.shape[0],
            start,
            stop,
            w.shape[1],
        )
        if status:
            raise error_of(status, 0, 0)

    def read_memory(self, memory: Tensor, num_threads: int) -> float:
        """Sum of a contiguous float32 tensor of whole MiB: the plainest read, for measuring bandwidth."""
        return float(self.library.afd_read_memory(self.isa, num_threads, memory.data_ptr(), memory.numel() * 4))

    def num_workers(self) -> int:
        """Worker threads that are up; one pool serves the process."""
        return int(self.library.afd_num_workers())

    def start_threads(self, num_threads: int) -> None:
        """Starts the worker threads that num_threads need, to run on the cores that the calling thread may use now."""
        self.library.afd_start_workers(num_threads)

    def close(self) -> None:
        """Ends the worker threads; a later call with num_threads > 1 starts new ones."""
        self.library.afd_stop_workers()


def load_library(path: Path | None = None) -> ctypes.CDLL:
    """The shared library built beside this file. Raises KernelsUnavailableError with what to do."""
    path = path or Path(__file__).with_name("_native.so")
    if not path.exists():
        raise KernelsUnavailableError(
            f"{path} was not built (no C++ compiler at install time?): `python setup.py build_ext --inplace` builds it"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.afd_abi_version()
    except (OSError, AttributeError) as error:
        raise KernelsUnavailableError(f"{path} cannot be loaded: {error}") from error
    if version != _ABI_VERSION:
        raise KernelsUnavailableError(
            f"{path} has interface {version}, this code wants {_ABI_VERSION}: build it again "
            "(`python setup.py build_ext --inplace`)"
        )
    _declare(library)
    if fault := native_sampling.layout_fault(library):
        raise KernelsUnavailableError(f"{path}: {fault}: build it again (`python setup.py build_ext --inplace`)")
    return library


def available_isas(library: ctypes.CDLL) -> list[str]:
    """The instruction sets this processor can run, slowest first."""
    return [name for number, name in enumerate(ISAS) if library.afd_isa_available(number)]


def _declare(library: ctypes.CDLL) -> None:
    pointer, i32, i64, f32 = c_void_p, c_int32, c_int64, c_float
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "afd_isa_available": (i32, [i32]),
        "afd_paged_attention": (i32, [i32] * 3 + [pointer] * 7 + [i64] * 3 + [i32] * 9 + [f32, pointer]),
        "afd_write_kv": (i32, [i32] * 2 + [pointer] * 5 + [i64] * 2 + [i32] * 6 + [pointer]),
        "afd_rope_write_kv": (i32, [i32] * 2 + [pointer] * 8 + [i64] * 3 + [i32] * 9 + [pointer]),
        "afd_add_rms_norm": (i32, [i32] * 4 + [pointer] * 2 + [i32] + [pointer] * 2 + [i32] * 2 + [f32]),
        "afd_silu_mul": (i32, [i32] * 2 + [pointer] * 2 + [i64] * 2 + [i32] * 2 + [f32]),
        "afd_row_max": (None, [i32] * 2 + [pointer, i64] + [i32] * 2 + [pointer] * 2),
        "afd_sample_row_layout": (i32, [pointer, i32]),
        "afd_sample": (i32, [i32] * 2 + [pointer, i64, i32, pointer, i32] + [pointer] * 2),
        "afd_unpack_rows": (None, [i32, pointer, i32, i32, pointer, i32, pointer]),
        "afd_pack": (None, [pointer] + [i32] * 3),
        "afd_gemm": (i32, [i32] * 2 + [pointer] * 3 + [i32] + [i64] * 2 + [i32] * 3),
        "afd_gemm_row_max": (i32, [i32] * 2 + [pointer] * 4 + [i64] + [i32] * 4),
        "afd_swiglu": (i32, [i32] * 2 + [pointer] * 2 + [i64, i32, pointer]),
        "afd_experts": (i32, [i32] * 2 + [pointer] * 4 + [i32] * 2 + [pointer] * 3),
        "afd_attention_layer": (i32, [i32] * 2 + [pointer] * 4 + [i32] * 2 + [pointer] * 2 + [i32] * 2 + [pointer] * 2),
        "afd_relay_attention": (i32, [i32] * 2 + [pointer] * 4),
        "afd_relay_ffn": (i32, [i32] * 2 + [pointer] * 4),
        "afd_read_memory": (f32, [i32] * 2 + [pointer, i64]),
        "afd_start_workers": (None, [i32]),
        "afd_stop_workers": (None, []),
        "afd_num_workers": (i32, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def error_of(status: int, where: int, value: int) -> Exception:
    """What a status other than 0 says, with the call's error_detail."""
    if status == 20:
        return MemoryError("no memory for the scratch of a native kernel")
    if status >= _POST_FAILED:
        return OSError(status - _POST_FAILED, os.strerror(status - _POST_FAILED), "a lane's bell")
    reasons = {
        1: f"query_start must begin at 0, not fall, and end within q: sequence {where} has {value}",
        2: f"sequence {where} has seq_len {value}, less than its number of query tokens",
        3: f"sequence {where} has seq_len {value}: its row of block_table is too short for it",
        4: f"sequence {where} needs block {value}, which is not in the cache",
        10: f"slot_mapping[{where}] is behind the last slot of the cache",
    }
    return ValueError(reasons.get(status, f"native kernel failed with status {status}"))
