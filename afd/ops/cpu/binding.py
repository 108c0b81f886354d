"""The kernels of the C++ library `_native`, loaded with ctypes (which releases the GIL during a call)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from afd.ops.cpu import abi, sampling
from afd.ops.cpu.abi import CONSTANTS, ISAS, OUT_OF_MEMORY, AfdMatrix
from afd.ops.cpu.packed import PAIRS, QUADS, Packed, PackedInt8, PackedMatrix
from afd.ops.ops import AttentionArgs, KvWrite, Rotation, RowMax
from afd.ops.sample_rows import SampledRows, SampleRow

DTYPE_CODES = {torch.float32: CONSTANTS["kFloat32"], torch.bfloat16: CONSTANTS["kBfloat16"]}
_BUILD = "`python setup.py build_ext --inplace`"


class KernelsUnavailableError(RuntimeError):
    """The native library is missing, of another version, or the processor lacks what was asked for."""


class NativeKernels:
    """The library's kernels for one instruction set. Stateless but for the library's worker threads.

    Arguments are trusted: they were checked (`checks`), or lead outside of memory.
    """

    def __init__(self, library: ctypes.CDLL, isa: str) -> None:
        self.name = isa
        self.library = library
        self.isa = ISAS.index(isa)
        self.vectorised = isa != "portable"  # packed matrices pay, and whole layers in one call
        self.int8_order = QUADS if isa == "avx512" else PAIRS

    def matrix(self, packed: Packed | None) -> AfdMatrix:
        """Null pointers for None. ValueError for one that was packed for another instruction set."""
        if packed is None:
            return AfdMatrix(None, None)
        if isinstance(packed, PackedInt8) and packed.order != self.int8_order:
            raise ValueError(f"{self.name} multiplies int8 weights as {self.int8_order}, not as {packed.order}")
        return AfdMatrix(packed.data.data_ptr(), packed.scales.data_ptr() if isinstance(packed, PackedInt8) else None)

    def paged_attention(self, args: AttentionArgs, out: Tensor, num_threads: int) -> None:
        """out [num_tokens, num_heads, v_head_dim], whose tokens may be apart. Rows of padding are not written."""
        q, k_cache, v_cache, block_table, seq_lens, query_start, scale, window, *_ = args
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

    def rope_write_kv(self, q: Tensor, write: KvWrite, rotation: Rotation) -> None:
        """Rotate q in place, and store the rotated k, and v; k itself stays as it is. A negative slot skips."""
        k, v, k_cache, v_cache, slot_mapping = write
        cos, sin, interleaved = rotation
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
        return sampling.sample(self.library, self.isa, logits, rows, num_threads)

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
    """The shared library built beside this file, its interface checked. KernelsUnavailableError says what to do."""
    path = path or Path(__file__).with_name("_native.so")
    if not path.exists():
        raise KernelsUnavailableError(f"{path} was not built (no C++ compiler at install time?): {_BUILD} builds it")
    try:
        library = ctypes.CDLL(str(path))
        told = abi.told_by(library)
    except (OSError, AttributeError) as error:
        raise KernelsUnavailableError(f"{path} cannot be loaded: {error}; {_BUILD} builds it again") from error
    try:
        abi.check(told)
    except abi.AbiMismatchError as error:
        raise KernelsUnavailableError(
            f"{path} was built from other sources ({error}): build it again ({_BUILD})"
        ) from error
    abi.declare(library)
    return library


def available_isas(library: ctypes.CDLL) -> list[str]:
    """The instruction sets this processor can run, slowest first."""
    return [name for number, name in enumerate(ISAS) if library.afd_isa_available(number)]


def error_of(status: int, where: int, value: int) -> Exception:
    """What a status other than 0 says, with the call's error_detail."""
    if status == OUT_OF_MEMORY:
        return MemoryError("no memory for the scratch of a native kernel")
    reasons = {
        "BatchError::kQueryStart": f"query_start must begin at 0, not fall, end within q: sequence {where} has {value}",
        "BatchError::kSeqLen": f"sequence {where} has seq_len {value}, less than its number of query tokens",
        "BatchError::kTableTooShort": f"sequence {where} has seq_len {value}: its row of block_table is too short",
        "BatchError::kBlockIndex": f"sequence {where} needs block {value}, which is not in the cache",
        "kSlotOutOfRange": f"slot_mapping[{where}] is behind the last slot of the cache",
    }
    known = {CONSTANTS[name]: reason for name, reason in reasons.items()}
    return ValueError(known.get(status, f"native kernel failed with status {status}"))
