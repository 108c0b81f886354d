"""The library's C interface (`src/api.h`) as Python sees it: one table of functions, structures and constants.

The library tells its own table, as it was compiled (`afd_abi`, src/abi.cpp). `check` compares both when the library is
loaded: a wrong type, a field at another place or a constant with another value is an error there, and never a call that
reads the wrong memory. A structure does not keep alive what it points to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any

from afd.ops.sample_rows import ONE_MASS


class AfdMatrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("scales", c_void_p))


class AfdSwiGlu(ctypes.Structure):
    _fields_ = (
        ("gate_up", AfdMatrix),
        ("down", AfdMatrix),
        ("hidden", c_int32),
        ("width", c_int32),
        ("limit", c_float),
    )


class AfdExperts(ctypes.Structure):
    _fields_ = (
        ("gate_up", POINTER(AfdMatrix)),
        ("down", POINTER(AfdMatrix)),
        ("first", c_int32),
        ("num_local", c_int32),
        ("hidden", c_int32),
        ("width", c_int32),
        ("limit", c_float),
    )


class AfdAttentionLayer(ctypes.Structure):
    _fields_ = (
        ("attn_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("qkv", AfdMatrix),
        ("qkv_bias", c_void_p),
        ("q_norm", c_void_p),
        ("q_up", AfdMatrix),
        ("q_head_norm", c_void_p),
        ("k_head_norm", c_void_p),
        ("o", AfdMatrix),
        ("o_bias", c_void_p),
        *((name, c_int32) for name in ("hidden", "q_rank", "num_heads", "num_kv_heads", "head_dim", "v_dim")),
        *((name, c_int32) for name in ("head_gate", "half", "interleaved", "window")),
        ("scale", c_float),
        ("eps", c_float),
    )


class AfdBatch(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("cos", "sin", "slots", "block_table", "seq_lens", "query_start")),
        ("table_stride", c_int64),
        ("num_tokens", c_int32),
        ("num_seqs", c_int32),
    )


class AfdSampleRow(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("prompt", "output", "bias_ids", "biases", "masked")),
        *((name, c_int32) for name in ("num_prompt", "num_output", "num_biases", "num_masked")),
        ("seed", c_uint64),
        ("position", c_uint32),
        ("choice", c_uint32),
        ("top_p", c_double),
        ("frequency", c_double),
        ("presence", c_double),
        ("repetition", c_float),
        ("scale", c_float),
        ("top_k", c_int32),
        ("least", c_int32),
        ("num_logprobs", c_int32),
    )


class AfdSampled(ctypes.Structure):
    _fields_ = (("tokens", c_void_p), ("logprobs", c_void_p), ("top_ids", c_void_p), ("num_top", c_int32))


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    AfdMatrix,
    AfdSwiGlu,
    AfdExperts,
    AfdAttentionLayer,
    AfdBatch,
    AfdSampleRow,
    AfdSampled,
)

_i32, _i64, _f32, _ptr = c_int32, c_int64, c_float, c_void_p

FUNCTIONS: Mapping[str, tuple[Any, Sequence[Any]]] = {
    "afd_isa_available": (_i32, [_i32]),
    "afd_paged_attention": (_i32, [_i32] * 3 + [_ptr] * 7 + [_i64] * 3 + [_i32] * 9 + [_f32, _ptr]),
    "afd_rope_write_kv": (_i32, [_i32] * 2 + [_ptr] * 8 + [_i64] * 3 + [_i32] * 9 + [_ptr]),
    "afd_add_rms_norm": (_i32, [_i32] * 4 + [_ptr] * 2 + [_i32] + [_ptr] * 2 + [_i32] * 2 + [_f32]),
    "afd_silu_mul": (_i32, [_i32] * 2 + [_ptr] * 2 + [_i64] * 2 + [_i32] * 2 + [_f32]),
    "afd_row_max": (None, [_i32] * 2 + [_ptr, _i64] + [_i32] * 2 + [_ptr] * 2),
    "afd_sample": (_i32, [_i32] * 2 + [_ptr, _i64, _i32, _ptr, _i32] + [_ptr] * 2),
    "afd_unpack_rows": (None, [_i32, _ptr, _i32, _i32, _ptr, _i32, _ptr]),
    "afd_pack": (None, [_ptr] + [_i32] * 3),
    "afd_gemm": (_i32, [_i32] * 2 + [_ptr] * 3 + [_i32] + [_i64] * 2 + [_i32] * 3),
    "afd_gemm_row_max": (_i32, [_i32] * 2 + [_ptr] * 4 + [_i64] + [_i32] * 4),
    "afd_swiglu": (_i32, [_i32] * 2 + [_ptr] * 2 + [_i64, _i32, _ptr]),
    "afd_experts": (_i32, [_i32] * 2 + [_ptr] * 4 + [_i32] * 2 + [_ptr] * 3),
    "afd_attention_layer": (_i32, [_i32] * 2 + [_ptr] * 4 + [_i32] * 2 + [_ptr] * 2 + [_i32] * 2 + [_ptr] * 2),
    "afd_read_memory": (_f32, [_i32] * 2 + [_ptr, _i64]),
    "afd_start_workers": (None, [_i32]),
    "afd_stop_workers": (None, []),
    "afd_num_workers": (_i32, []),
}
"""The result and the arguments of each function."""

ISAS = ("portable", "avx2", "avx512")
"""Instruction sets, slowest first; the position is the number the library knows them by."""

KEY_GROUP = 8
"""Block sizes and head dimensions of the KV cache are multiples of this."""
MAX_PARTIALS = 16
"""Tensors that are added to a residual in one call."""
PANEL_ROWS = 64
"""Rows of a bfloat16 matrix that are packed together."""
INT8_PANEL_ROWS = 32
"""Rows of an int8 matrix that are packed together."""
OUT_OF_MEMORY = 20

CONSTANTS: Mapping[str, int] = {
    "kIsaPortable": ISAS.index("portable"),
    "kIsaAvx2": ISAS.index("avx2"),
    "kIsaAvx512": ISAS.index("avx512"),
    "kFloat32": 0,
    "kBfloat16": 1,
    "kKeyGroup": KEY_GROUP,
    "kMaxPartials": MAX_PARTIALS,
    "kPanel": PANEL_ROWS,
    "kInt8Panel": INT8_PANEL_ROWS,
    "kOneMass": ONE_MASS,
    "BatchError::kQueryStart": 1,
    "BatchError::kSeqLen": 2,
    "BatchError::kTableTooShort": 3,
    "BatchError::kBlockIndex": 4,
    "kSlotOutOfRange": 10,
    "kNoSuchToken": 11,
    "kOutOfMemory": OUT_OF_MEMORY,
}
"""Numbers of the library that Python repeats, by their names in `src/`."""


class AbiMismatchError(Exception):
    """The library was built from other sources than these."""


def told_by(library: ctypes.CDLL, teller: str = "afd_abi") -> dict[str, str]:
    """The library's own table: its entries, as `entries` writes them, by their names. AttributeError if it has none.

    teller: the function that tells it, of this interface or of one beside it.
    """
    function = getattr(library, teller)
    function.restype, function.argtypes = ctypes.c_char_p, []
    return dict(line.split("=", 1) for line in function().decode().splitlines())


def check(
    told: Mapping[str, str],
    structures: Sequence[type[ctypes.Structure]] = STRUCTURES,
    functions: Mapping[str, tuple[Any, Sequence[Any]]] = FUNCTIONS,
    constants: Mapping[str, int] = CONSTANTS,
) -> None:
    """Raise AbiMismatchError for the first entry that the library (`told_by`) does not have, or has otherwise."""
    for name, ours in entries(structures, functions, constants):
        theirs = told.get(name)
        if theirs != ours:
            found = "has none" if theirs is None else f"has {theirs}"
            raise AbiMismatchError(f"{name} is {ours} here, the library {found}")


def entries(
    structures: Sequence[type[ctypes.Structure]],
    functions: Mapping[str, tuple[Any, Sequence[Any]]],
    constants: Mapping[str, int],
) -> Iterator[tuple[str, str]]:
    """(name, value) of all that is compared: types of functions, sizes of structures, places of fields, constants."""
    for name, (result, arguments) in functions.items():
        yield name, f"{_code(result)}({''.join(_code(argument) + ',' for argument in arguments)})"
    for structure in structures:
        yield structure.__name__, _code(structure)
        for name, *type_ in structure._fields_:
            # A field that is a keyword in Python has an underscore behind it.
            place = getattr(structure, name).offset
            yield f"{structure.__name__}.{name.rstrip('_')}", f"{_code(type_[0])}@{place}"
    for name, value in constants.items():
        yield name, str(value)


_CODES = {
    None: "void",
    c_int32: "i32",
    c_int64: "i64",
    c_uint32: "u32",
    c_uint64: "u64",
    c_float: "f32",
    c_double: "f64",
    c_void_p: "ptr",
}


def _code(type_: Any) -> str:
    """A C type as src/abi.cpp writes it."""
    if type_ in _CODES:
        return _CODES[type_]
    if issubclass(type_, ctypes.Array):
        return f"{_code(type_._type_)}*{type_._length_}"
    return f"struct{ctypes.sizeof(type_)}" if issubclass(type_, ctypes.Structure) else "ptr"


def declare(library: ctypes.CDLL, functions: Mapping[str, tuple[Any, Sequence[Any]]] = FUNCTIONS) -> None:
    """Tell ctypes the types of the library's functions."""
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
