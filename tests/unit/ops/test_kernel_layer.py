"""Whole layers in one call, against the same composed from single kernels in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.ops.cpu.binding import NativeKernels
from afd.ops.cpu.layer import AttentionLayerCall, ExpertsCall, LayerBatch, NativeWeights, SwiGluCall
from afd.ops.cpu.packed import QUADS, Packed, PackedInt8, PackedMatrix
from afd.ops.ops import AttentionArgs, KvWrite, LayerShape, LayerTables, Rotation, Routing
from afd.ops.reference import ReferenceOps, add_rms_norm

REFERENCE = ReferenceOps(torch.bfloat16)
FAST = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HIDDEN, BLOCK = 72, 8
KINDS = ("bfloat16", "int8")


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def packed(kernels: NativeKernels, w: Tensor) -> PackedMatrix:
    copy = w.clone()
    kernels.pack(copy)
    return PackedMatrix(copy)


def packed_as(kind: str, kernels: NativeKernels, w: Tensor) -> tuple[Packed, Tensor]:
    """w [n, k] packed, and the matrix [n, k] that it stands for."""
    if kind == "bfloat16":
        return packed(kernels, w), w
    scales = w.float().norm(dim=1) / (127 if w.shape[1] else 1)  # no element is above its row's norm
    values = (w.float() / scales.clamp(min=1e-30)[:, None]).round()
    return PackedInt8.pack(values.to(torch.int8), scales.clone(), kernels.int8_order), values * scales[:, None]


def allowed(error: float, kind: str, kernels: NativeKernels) -> float:
    """A relative error that rounding explains, where with QUADS x is rounded to 8 bits as well."""
    return 3 * error if kind == "int8" and kernels.int8_order == QUADS else error


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """Float32, from a bfloat16 intermediate result where the kernels round."""
    active = REFERENCE.silu_mul(x.float() @ gate_up.float().T, limit)
    return active.bfloat16().float() @ down.float().T


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))


@FAST
@given(
    num_rows=st.sampled_from([0, 1, 7, 63, 64, 65, 300]),
    width=st.sampled_from([0, 2, 40, 96]),
    limit=st.sampled_from([0.0, 0.7]),
    kind=st.sampled_from(KINDS),
)
def test_swiglu(kernels: NativeKernels, num_rows: int, width: int, limit: float, kind: str) -> None:
    x = random(num_rows, HIDDEN + 8, seed=0)[:, :HIDDEN]
    gate_up, down = random(2 * width, HIDDEN, seed=1, scale=0.2), random(HIDDEN, width, seed=2, scale=0.2)
    (first, gate_up), (second, down) = (packed_as(kind, kernels, w) for w in (gate_up, down))
    call = SwiGluCall(kernels, first, second, limit)
    got = call(x)
    assert got.dtype is torch.bfloat16 and got.shape == (num_rows, HIDDEN)
    assert relative_error(got, swiglu(x, gate_up, down, limit)) < allowed(1e-2, kind, kernels)
    if num_rows > 3:
        assert torch.equal(call(x[2:3]), got[2:3]), "a row depends on its batch"


@FAST
@given(
    num_rows=st.integers(0, 9),
    top_k=st.integers(1, 3),
    first=st.integers(0, 4),
    num_local=st.integers(1, 5),
    crowded=st.booleans(),
    measured=st.booleans(),
    kind=st.sampled_from(KINDS),
)
def test_experts(
    kernels: NativeKernels,
    num_rows: int,
    top_k: int,
    first: int,
    num_local: int,
    crowded: bool,
    measured: bool,
    kind: str,
) -> None:
    """Any routing, those to experts that live elsewhere and ids that no one has included."""
    num_experts, width = 6, 40
    num_rows = 300 if crowded else num_rows
    x = random(num_rows, HIDDEN, seed=0)
    generator = torch.Generator().manual_seed(num_rows)
    choices = [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_rows)]
    ids = (torch.stack(choices) if choices else torch.empty(0, top_k)).int()
    weights = torch.rand(num_rows, top_k, generator=generator)
    gate_up = random(num_local, 2 * width, HIDDEN, seed=1, scale=0.2)
    down = random(num_local, HIDDEN, width, seed=2, scale=0.2)
    pairs = [[packed_as(kind, kernels, w) for w in stack] for stack in (gate_up, down)]
    (ups, gate_up), (downs, down) = ([list(part) for part in zip(*stack, strict=True)] for stack in pairs)
    call = ExpertsCall(kernels, ups, downs, first, 0.0)
    out = random(num_rows, HIDDEN, seed=5).float()
    want = out.clone()
    counts, squares = call.add_to(out, x, Routing(ids, weights), measured)
    expected_squares = []
    for local in range(num_local):
        tokens, choice = (ids == first + local).nonzero(as_tuple=True)
        answers = swiglu(x[tokens], gate_up[local], down[local], 0.0)
        want.index_add_(0, tokens, answers * weights[tokens, choice][:, None])
        assert counts[local] == len(tokens)
        expected_squares.append(float(answers.square().mean(dim=1).sum()))
    assert relative_error(out, want) < allowed(5e-3, kind, kernels)
    assert (squares is not None) == measured
    if squares is not None:
        assert squares == pytest.approx(expected_squares, rel=2e-2, abs=1e-6)


GQA = LayerShape(
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    v_head_dim=16,
    q_rank=0,
    head_gate=False,
    rotary_half=8,
    interleaved=False,
    window=0,
    scale=0.25,
    eps=1e-5,
)
SHAPES = {
    "gqa": GQA,
    "gqa with biases": GQA,
    "gqa with head norms, part rotation and a window": replace(GQA, rotary_half=4, window=5),
    "gqa with a head gate and interleaved pairs": replace(GQA, head_gate=True, interleaved=True),
    "mfa": replace(GQA, num_heads=12, num_kv_heads=1, q_rank=24, v_head_dim=8),
}


def layer_weights(kind: str, shape: LayerShape) -> dict[str, Tensor]:
    q_width = shape.num_heads * shape.head_dim
    widths = (shape.q_rank or q_width) + shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)
    weights = {
        "attn_norm": random(HIDDEN, seed=1).float(),
        "ffn_norm": random(HIDDEN, seed=2).float(),
        "qkv": random(widths + shape.head_gate * shape.num_heads, HIDDEN, seed=3, scale=0.2),
        "o": random(HIDDEN, shape.num_heads * shape.v_head_dim, seed=4, scale=0.2),
    }
    if shape.q_rank:
        weights["q_norm"] = random(shape.q_rank, seed=5).float()
        weights["q_up"] = random(q_width, shape.q_rank, seed=6, scale=0.2)
    if "biases" in kind:
        weights["qkv_bias"] = random(widths, seed=7)
        weights["o_bias"] = random(HIDDEN, seed=8)
    if "head norms" in kind:
        weights["q_head_norm"] = random(shape.head_dim, seed=9).float()
        weights["k_head_norm"] = random(shape.head_dim, seed=10).float()
    return weights


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    add_rms_norm(x, (), weight, eps, out)
    return out


def composed(x: Tensor, w: dict[str, Tensor], s: LayerShape, tables: LayerTables, k: Tensor, v: Tensor) -> Tensor:
    """The layer from reference kernels; x, k and v are written to."""
    cos, sin, slots, block_table, seq_lens, query_start = tables
    n, q_width = x.shape[0], s.num_heads * s.head_dim
    projected = (norm(x, w["attn_norm"], s.eps).float() @ w["qkv"].float().T).bfloat16()
    widths = [s.q_rank or q_width, s.num_kv_heads * s.head_dim, s.num_kv_heads * s.v_head_dim]
    if "qkv_bias" in w:
        projected[:, : sum(widths)] += w["qkv_bias"]
    q, new_k, new_v, gate = torch.split(projected, [*widths, projected.shape[1] - sum(widths)], dim=1)
    if s.q_rank:
        q = (norm(q.contiguous(), w["q_norm"], s.eps).float() @ w["q_up"].float().T).bfloat16()
    q = q.reshape(n, s.num_heads, s.head_dim)
    new_k = new_k.reshape(n, s.num_kv_heads, s.head_dim)
    if "q_head_norm" in w:
        q = norm(q.reshape(-1, s.head_dim), w["q_head_norm"], s.eps).view_as(q)
        new_k = norm(new_k.reshape(-1, s.head_dim), w["k_head_norm"], s.eps).view_as(new_k)
    new_v = new_v.reshape(n, s.num_kv_heads, s.v_head_dim)
    q = REFERENCE.rope_write_kv(q, KvWrite(new_k, new_v, k, v, slots), Rotation(cos, sin, s.interleaved))
    lengths = seq_lens.numpy(), query_start.numpy()
    args = AttentionArgs(q, k, v, block_table, seq_lens, query_start, s.scale, s.window, *lengths)
    out = REFERENCE.paged_attention(args)
    if s.head_gate:
        out = (out.float() * torch.sigmoid(gate.float())[:, :, None]).bfloat16()
    x += out.flatten(1).float() @ w["o"].float().T
    if "o_bias" in w:
        x += w["o_bias"].float()
    return norm(x, w["ffn_norm"], s.eps)


def batch_tables(lengths: list[tuple[int, int]], shape: LayerShape, num_blocks: int) -> LayerTables:
    """lengths: (context, new tokens) of each sequence."""
    num_tokens = sum(new for _, new in lengths)
    most = max((-(-context // BLOCK) for context, _ in lengths), default=0)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).int()
    table = torch.zeros(len(lengths), most, dtype=torch.int32)
    slots, starts, used = [], [0], 0
    for i, (context, new) in enumerate(lengths):
        count = -(-context // BLOCK)
        table[i, :count] = order[used : used + count]
        used += count
        slots += [int(table[i, p // BLOCK]) * BLOCK + p % BLOCK for p in range(context - new, context)]
        starts.append(starts[-1] + new)
    angles = torch.rand(num_tokens, shape.rotary_half, generator=torch.Generator().manual_seed(4)) * 6
    contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
    return LayerTables(
        angles.cos(),
        angles.sin(),
        torch.tensor(slots, dtype=torch.int64),
        table,
        contexts,
        torch.tensor(starts, dtype=torch.int32),
    )


@pytest.mark.parametrize(("num_threads", "weight_kind"), [(1, "bfloat16"), (2, "bfloat16"), (2, "int8")])
@pytest.mark.parametrize("kind", SHAPES)
def test_attention_layer(kernels: NativeKernels, kind: str, num_threads: int, weight_kind: str) -> None:
    shape = SHAPES[kind]
    plain = layer_weights(kind, shape)
    matrices = {k: packed_as(weight_kind, kernels, plain[k]) for k in ("qkv", "o", "q_up") if k in plain}
    weights = NativeWeights(**(plain | {k: matrix for k, (matrix, _) in matrices.items()}))
    plain |= {k: meant for k, (_, meant) in matrices.items()}
    call = AttentionLayerCall(kernels, weights, shape)
    torch.set_num_threads(num_threads)
    try:
        for lengths in ([(1, 1)], [(20, 1), (9, 4), (33, 1)], [(40, 40), (17, 1)], []):
            tables = batch_tables(lengths, shape, 16)
            x = random(tables[2].shape[0], HIDDEN, seed=11).float()
            caches = [random(16, shape.num_kv_heads, BLOCK, d, seed=12) for d in (shape.head_dim, shape.v_head_dim)]
            own_x, own_caches = x.clone(), [c.clone() for c in caches]
            partials = [random(*x.shape, seed=13 + i) for i in range(len(lengths))]
            rows = call(own_x, partials, LayerBatch(tables), *own_caches)
            for partial in partials:
                x += partial
            if lengths:
                want = composed(x, plain, shape, tables, *caches)
                assert relative_error(rows, want) < allowed(1e-2, weight_kind, kernels)
                assert relative_error(own_x, x) < allowed(5e-3, weight_kind, kernels)
                for got, cache in zip(own_caches, caches, strict=True):
                    assert relative_error(got, cache) < allowed(5e-3, weight_kind, kernels)
    finally:
        torch.set_num_threads(1)


def test_a_block_that_is_not_there_is_refused_before_anything_is_written(kernels: NativeKernels) -> None:
    plain = layer_weights("gqa", GQA)
    weights = NativeWeights(**{k: packed(kernels, w) if k in ("qkv", "o") else w for k, w in plain.items()})
    call = AttentionLayerCall(kernels, weights, GQA)
    good = batch_tables([(20, 2)], GQA, 4)
    x = random(2, HIDDEN, seed=1).float()
    caches = [torch.zeros(4, 2, BLOCK, 16, dtype=torch.bfloat16) for _ in range(2)]
    before = x.clone()
    for place, wrong in ((3, torch.full_like(good[3], 4)), (2, torch.full_like(good[2], 4 * BLOCK))):
        tables = LayerTables(*good[:place], wrong, *good[place + 1 :])
        with pytest.raises(ValueError, match=r"not in the cache|behind the last slot"):
            call(x, (), LayerBatch(tables), *caches)
        assert torch.equal(x, before) and not any(cache.any() for cache in caches)
    with pytest.raises(ValueError, match="tokens"):
        LayerBatch(LayerTables(*good[:2], good[2][:1], *good[3:]))


def test_weights_that_do_not_fit_are_refused(kernels: NativeKernels) -> None:
    plain = layer_weights("gqa", GQA)
    good = {k: packed(kernels, w) if k in ("qkv", "o") else w for k, w in plain.items()}
    for name, wrong in (
        ("qkv", packed(kernels, plain["qkv"][:-2].contiguous())),
        ("attn_norm", plain["attn_norm"].bfloat16()),
        ("q_head_norm", torch.ones(15)),
        ("qkv_bias", torch.ones(160)),
    ):
        with pytest.raises(ValueError, match=name):
            AttentionLayerCall(kernels, NativeWeights(**(good | {name: wrong})), GQA)
    with pytest.raises(ValueError, match="q_up"):
        AttentionLayerCall(
            kernels, NativeWeights(**(good | {"qkv": packed(kernels, plain["qkv"][:88])})), replace(GQA, q_rank=24)
        )
    with pytest.raises(ValueError, match="gate_up"):
        SwiGluCall(kernels, good["qkv"], good["o"], 0.0)
