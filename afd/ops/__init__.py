"""CPU kernels: attention over a paged KV cache, KV writes, norms, SwiGLU, and a GEMM; `fused` has whole layers.

A C++ library does the work (`src/`: AVX-512 BF16, AVX2 or portable code, chosen at run time), loaded once a process. If
it was not built, a warning says so once and torch does the work (`reference.py`): the same results within rounding,
slower. `AFD_KERNELS_ISA` (portable, avx2, avx512, reference) forces a choice, for tests and debugging.

Tensors live on the CPU, in float32 or bfloat16; sums are float32. All functions may be called from any thread, release
the GIL while they work, and write only to what they are documented to write to.

KV cache of one layer: `k_cache` and `v_cache`, contiguous `[num_blocks, num_kv_heads, block_size, head_dim]`,
block_size and head_dim multiples of 8, head_dim at most 512 (that of V may differ).

The result for a row depends on that row and its context alone, bit for bit: not on the batch it is computed in, on the
way a prompt is cut into chunks, or on num_threads.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from afd.ops.cpu import checks as arguments
from afd.ops.cpu.binding import ISAS, KernelsUnavailableError, NativeKernels, available_isas, load_library
from afd.ops.cpu.packed import Packed, PackedInt8, PackedMatrix
from afd.ops.ops import MAX_PARTIALS, Kernels, RowMax
from afd.ops.reference import ReferenceKernels
from afd.ops.sample_rows import RowLogprobs, SampledRows, SampleRow

__all__ = [
    "MAX_PARTIALS",
    "KernelsUnavailableError",
    "Packed",
    "PackedInt8",
    "PackedMatrix",
    "RowLogprobs",
    "RowMax",
    "SampleRow",
    "SampledRows",
    "active_isa",
    "add_rms_norm",
    "can_pack",
    "can_pack_int8",
    "close",
    "gemm",
    "gemm_row_max",
    "native_kernels",
    "pack",
    "pack_int8",
    "paged_attention",
    "rms_norm",
    "rope_write_kv",
    "row_max",
    "sample",
    "select_kernels",
    "silu_mul",
    "start_threads",
    "unpack_rows",
    "write_kv",
]


def select_kernels(isa: str | None = None) -> Kernels:
    """The kernels of one instruction set, or the best there is for None; `"reference"` for torch.

    Raises KernelsUnavailableError if `isa` is not to be had here.
    """
    if isa == "reference":
        return ReferenceKernels()
    if isa is not None and isa not in ISAS:
        raise KernelsUnavailableError(f"no instruction set {isa!r}: use one of {', '.join(ISAS)}, reference")
    library = load_library()
    available = available_isas(library)
    if isa is not None and isa not in available:
        raise KernelsUnavailableError(f"this processor has no {isa}: it can run {', '.join(available)}")
    return NativeKernels(library, isa or available[-1])


@functools.cache
def _kernels() -> Kernels:
    forced = os.environ.get("AFD_KERNELS_ISA")
    if forced:
        return select_kernels(forced)
    try:
        return select_kernels()
    except KernelsUnavailableError as error:
        warnings.warn(f"native kernels are not in use, attention will be slow: {error}", RuntimeWarning, stacklevel=3)
        return ReferenceKernels()


def active_isa() -> str:
    """`avx512`, `avx2`, `portable`, or `reference` for the torch path."""
    return _kernels().name


def native_kernels() -> NativeKernels | None:
    """The native kernels if they are in use and vectorised for this processor: what `afd.ops.cpu.layer` needs."""
    kernels = _kernels()
    return kernels if isinstance(kernels, NativeKernels) and kernels.name != "portable" else None


def start_threads(num_threads: int) -> None:
    """Starts the worker threads that num_threads need, to run on the cores that the calling thread may use now.

    Without this the first call with num_threads > 1 does it.
    """
    kernels = _kernels()
    if isinstance(kernels, NativeKernels):
        kernels.start_threads(num_threads)


def close() -> None:
    """Ends the worker threads, if any were started; a later call with num_threads > 1 starts new ones."""
    kernels = _kernels()
    if isinstance(kernels, NativeKernels):
        kernels.close()


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
    num_threads: int = 1,
) -> Tensor:
    """Causal attention of a mixed batch: sequences with one query token (decode) and with many (prefill chunks).

    q: `[num_tokens, num_heads, head_dim]`, the sequences' tokens one after another; tokens may be apart in memory.
    block_table: int32 `[num_seqs, max_blocks]`; a sequence's row names the blocks of its positions in order. Entries
        behind its last position, or before its window, are not read.
    seq_lens: int32 `[num_seqs]`, context lengths including this step's tokens, whose K and V are already written.
    query_start: int32 `[num_seqs + 1]`; sequence i has tokens query_start[i] to query_start[i + 1], its last ones.
        Tokens behind query_start[-1] are padding: their rows of `out` are not written.
    window: a query at position i sees key j if i - j < window; 0 means no window.
    Returns `[num_tokens, num_heads, v_head_dim]`, `out` if given.

    Raises ValueError for shapes, dtypes, lengths and block indices that do not fit, before anything is written.
    """
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])
    arguments.check_attention(q, k_cache, v_cache, block_table, seq_lens, query_start, window, out, num_threads)
    _kernels().paged_attention(q, k_cache, v_cache, block_table, seq_lens, query_start, scale, window, out, num_threads)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Stores k and v `[num_tokens, num_kv_heads, head_dim]` in the cache.

    slot_mapping: int64 `[num_tokens]`, block * block_size + offset; a negative slot skips the token.
    """
    arguments.check_kv_write(k, v, k_cache, v_cache, slot_mapping)
    _kernels().write_kv(k, v, k_cache, v_cache, slot_mapping)


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool = False,
) -> None:
    """Rotates q in place, and stores the rotated k, and v, as `write_kv` does; k itself stays as it is.

    cos, sin: float32 `[num_tokens, rotary_dim / 2]`, of each token's position. Dimension i is paired with
        i + rotary_dim / 2, or 2 i with 2 i + 1 if interleaved; dimensions from rotary_dim on pass unchanged.
    """
    arguments.check_kv_write(k, v, k_cache, v_cache, slot_mapping)
    arguments.check_rope(q, k, cos, sin)
    _kernels().rope_write_kv(q, k, v, cos, sin, interleaved, k_cache, v_cache, slot_mapping)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for each row of x `[num_tokens, hidden]`; weight is float32 `[hidden]`."""
    out = torch.empty_like(x) if out is None else out
    arguments.check_norm(x, (), weight, out)
    _kernels().add_rms_norm(x, (), weight, eps, out)
    return out


def add_rms_norm(
    x: Tensor, partials: Sequence[Tensor], weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Adds the partials to the residual x in place, in their order in float32, and returns the RMSNorm of the new x.

    partials: up to 16 tensors of x's shape, of one dtype, which may be another than that of x. weight: float32.
    """
    out = torch.empty_like(x) if out is None else out
    arguments.check_norm(x, partials, weight, out)
    _kernels().add_rms_norm(x, partials, weight, eps, out)
    return out


def silu_mul(gate_up: Tensor, limit: float = 0.0, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of `[num_tokens, 2 * width]` (gate, then up): `[num_tokens, width]`.

    limit > 0: min(silu(gate), limit) * clamp(up, -limit, limit), the clamped SwiGLU of Step-3.5.
    """
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2) if out is None else out
    arguments.check_silu_mul(gate_up, out)
    _kernels().silu_mul(gate_up, limit, out)
    return out


def row_max(x: Tensor, num_threads: int = 1) -> RowMax:
    """The largest element in each row of x `[m, n]` float32, n > 0, and its place.

    Of equal ones the first; a row with a NaN gives its first NaN, as numpy's argmax does.
    """
    arguments.check_row_max(x, num_threads)
    out = RowMax.of_nothing(x.shape[0])
    _kernels().row_max(x, out, num_threads)
    return out


def sample(logits: Tensor, rows: Sequence[SampleRow], num_threads: int = 1) -> SampledRows:
    """A token for each row of logits `[m, vocab]` float32, by the rule of docs/sampling.md.

    A token is a function of its row's logits and parameters alone. IndexError where these name a token that is not in
    the vocabulary.
    """
    arguments.check_sample(logits, len(rows), num_threads)
    return _kernels().sample(logits, rows, num_threads)


def can_pack(w: Tensor) -> bool:
    """True where `gemm` is faster than torch's for a matrix like w: bfloat16 on a processor with AVX2 or AVX-512."""
    fits = w.dim() == 2 and w.dtype is torch.bfloat16 and w.is_cpu and w.is_contiguous() and w.shape[1] % 2 == 0
    return fits and native_kernels() is not None


def pack(w: Tensor) -> PackedMatrix:
    """Bring w [n, k] into the order that `gemm` reads, in its place: w's memory belongs to the result from then on."""
    arguments.check_pack(w)
    native = native_kernels()
    if native is None:
        raise KernelsUnavailableError("packed matrices need the native kernels; see can_pack")
    native.pack(w)
    return PackedMatrix(w)


def can_pack_int8(values: Tensor) -> bool:
    """True where `gemm` over int8 values `[n, k]` can run: on a processor with AVX2 or AVX-512."""
    return values.dim() == 2 and values.is_cpu and native_kernels() is not None


def pack_int8(values: Tensor, scales: Tensor) -> PackedInt8:
    """Bring int8 values `[n, k]` and their rows' scales `[n]` float32 into the order that `gemm` reads.

    values are -127 to 127. Their memory belongs to the result from then on.
    """
    arguments.check_pack_int8(values, scales)
    native = native_kernels()
    if native is None:
        raise KernelsUnavailableError("packed matrices need the native kernels; see can_pack_int8")
    return PackedInt8.pack(values, scales, native.int8_order)


def unpack_rows(w: PackedMatrix, idx: Tensor, num_threads: int = 1) -> Tensor:
    """Rows idx `[m]` int64 of w `[n, k]`: `[m, k]` float32. IndexError for a row that is not there."""
    arguments.check_unpack_rows(w, idx, num_threads)
    native = native_kernels()
    if native is None:
        return w.rows(idx).float()
    out = torch.empty(idx.shape[0], w.shape[1], dtype=torch.float32)
    native.unpack_rows(w, idx, out, num_threads)
    return out


def gemm(x: Tensor, w: Packed, out: Tensor | None = None, num_threads: int = 1) -> Tensor:
    """x `[m, k]` times the transpose of w `[n, k]`, bfloat16: `[m, n]`. `out` may be float32.

    With int8 weights x is rounded, too (`reference.round_rows`): with AVX-512 VNNI to 8 bits beside the largest of 64
    elements of a row, else to 9 to 15 bits beside the row's largest one. Sums over what has one scale are exact.
    """
    out = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    arguments.check_gemm(x, w, out, num_threads)
    _kernels().gemm(x, w, out, num_threads)
    return out


def gemm_row_max(x: Tensor, w: Packed, best: RowMax, start: int, stop: int, num_threads: int = 1) -> None:
    """Go on in `best`, `row_max` of what `gemm` would write to a float32 `out`, from column start to stop.

    The products are not kept, which saves their way to memory. best: of the columns before start, which were as many
    whole panels of w's rows; `RowMax.of_nothing` before the first.
    """
    arguments.check_gemm_row_max(x, w, best, start, stop, num_threads)
    _kernels().gemm_row_max(x, w, best, start, stop, num_threads)
