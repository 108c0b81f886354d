"""float8 checkpoints, 8-bit weights, rows on the wire: against plain arithmetic, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from afd.errors import ModelError
from afd.model.attention_kinds import AttentionWeights
from afd.model.ffn import Dispatch
from afd.model.halves import AttentionHalf
from afd.model.inventory import inventory
from afd.model.loading import DEFAULT_MODEL, load_attention_half, load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.model.weights.block_fp8 import E4M3_VALUES
from afd.model.weights.checkpoint import as_float32
from afd.model.wire_format import decode_rows, encode_rows
from afd.ops.cpu.packed import Packed, PackedInt8
from afd.ops.cpu.packed_reference import int8_product
from afd.ops.int8 import Int8Weight, int8_copy, int8_in, int8_linear
from afd.ops.select import select
from afd.types import FfnParallel
from stepmesh.types import WireDtype
from tests.fakes.native_ops import native_ops

Tensors = dict[str, torch.Tensor]
BLOCK = (48, 40)  # divides no dimension of the tests' models: short blocks at both ends


def test_e4m3_is_torchs() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        torch.from_numpy(E4M3_VALUES), bits.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True
    )


def _block_scaled(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8 values, scales, the numbers they stand for) of [..., rows, columns], one block at a time."""
    rows, columns = matrix.shape[-2:]
    scales = torch.empty(*matrix.shape[:-2], -(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    values, meant = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            at = (..., slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scale = matrix[at].abs().amax(dim=(-2, -1)) / 448
            scales[..., i, j] = scale
            values[at] = (matrix[at] / scale[..., None, None]).to(torch.float8_e4m3fn)
            meant[at] = values[at].float() * scale[..., None, None]
    return values, scales, meant


@pytest.fixture
def fp8_folder(make_folder: Callable[..., Path]) -> Callable[[str], tuple[Path, Tensors]]:
    """A preset's folder with every matrix but embedding, head and router in float8, and the numbers meant."""

    def make(preset: str) -> tuple[Path, Tensors]:
        def edit(config: dict[str, object]) -> None:
            config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}

        folder = make_folder(preset, edit)
        stored: Tensors = {}
        meant: Tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            keep = tensor.dim() < 2 or any(part in name for part in ("embed", "lm_head", ".gate.weight"))
            if keep:
                stored[name] = meant[name] = tensor
            else:
                stored[name], stored[f"{name}_scale_inv"], meant[name] = _block_scaled(tensor)
        save_file(stored, folder / "model.safetensors")
        return folder, meant

    return make


@pytest.mark.parametrize("preset", ["step3-tiny", "deepseek-v3-tiny"])
def test_a_float8_checkpoint_is_read_as_the_numbers_meant(
    fp8_folder: Callable[[str], tuple[Path, Tensors]], preset: str
) -> None:
    """Whole tensors and any slice, packed experts and experts one by one."""
    folder, meant = fp8_folder(preset)
    checkpoint = resolve_model(str(folder)).checkpoint
    for tensor in inventory(checkpoint.spec):
        names = [checkpoint.naming.stored_name(tensor, e) for e in range(tensor.shape[0])]
        per_expert = checkpoint.naming.is_per_expert(tensor.part)
        whole = torch.stack([meant[n] for n in names]) if per_expert else meant[names[0]]
        cut = tuple(slice(size // 3, size - size // 5) for size in tensor.shape)
        for slices in ((), cut, cut[:1]):
            got = torch.from_numpy(as_float32(checkpoint.read(tensor, slices)))
            torch.testing.assert_close(got, whole[slices], rtol=1e-6, atol=0)


def test_float8_shards_add_up_to_the_whole(fp8_folder: Callable[[str], tuple[Path, Tensors]]) -> None:
    folder, _ = fp8_folder("step3-tiny")
    found = resolve_model(str(folder))
    dispatch = Dispatch(2, torch.randn(5, 128), torch.tensor([[0, 3, 7]] * 5, dtype=torch.int32), torch.rand(5, 3))
    whole = load_ffn_half(found, ShardSpec(), select("cpu", "float32")).layer(dispatch)
    for parallel in FfnParallel:
        parts = [
            load_ffn_half(found, ShardSpec(r, 3, parallel), select("cpu", "float32")).layer(dispatch) for r in range(3)
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)


def _rewrite(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


SCALE = "model.layers.1.moe.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(SCALE), f"missing tensor {SCALE}, the scales of F8_E4M3 tensor"),
        (
            lambda t: t.update({SCALE: torch.ones(8, 1, 1)}),
            r"expected shape \[8, 2, 4\], one scale for each block of 48",
        ),
        (lambda t: t.update({SCALE: t[SCALE].half()}), "scales are F32 or BF16, found F16"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}), "matrices only"),
        (lambda t: t.update({"model.layers.1.moe.gate.weight_scale_inv": torch.ones(1, 1)}), "extra tensor"),
    ],
    ids=["missing", "shape", "dtype", "vector", "scale of a float tensor"],
)
def test_wrong_scales_are_named(
    fp8_folder: Callable[[str], tuple[Path, Tensors]], edit: Callable[[Tensors], None], message: str
) -> None:
    folder, _ = fp8_folder("step3-tiny")
    _rewrite(folder, edit)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_another_quantisation_is_refused(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("llama-tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="quant_method 'awq' is not supported"):
        resolve_model(str(folder))


def test_int8_weights_are_the_rounded_matrix() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(24, 40) * torch.logspace(-3, 3, 24)[:, None]
    matrix[5] = 0
    weight = int8_in(torch.empty(24, 40, dtype=torch.int8))
    weight.store(0, 10, matrix[:10])
    weight.store(10, 24, matrix[10:])
    restored = weight.values * weight.scales[:, None]
    assert (restored - matrix).abs().amax(1).le(matrix.abs().amax(1) / 254 * 1.01).all()
    x = torch.randn(3, 40)
    torch.testing.assert_close(int8_linear(x, weight), F.linear(x, restored), rtol=1e-4, atol=1e-4)
    assert int8_linear(x.bfloat16(), weight).dtype is torch.bfloat16


def test_a_native_int8_product_is_near_torchs() -> None:
    """It rounds x as well, to 15 bits or 8 (`reference.round_rows`), and the result once, to bfloat16."""
    torch.manual_seed(2)
    weight = int8_copy(torch.randn(100, 77), torch.empty(100, 77, dtype=torch.int8), 1000)
    x = torch.randn(9, 77).bfloat16()
    ops, native = select("cpu", "bfloat16"), native_ops()
    matrix = ops.prepare(Int8Weight(weight.values.clone(), weight.scales.clone()))
    assert isinstance(matrix, PackedInt8) == (native is not None)
    exact, got = int8_linear(x.float(), weight), ops.linear(x, matrix)
    if native is not None:
        torch.testing.assert_close(
            got, int8_product(x, weight.values, weight.scales, native.kernels.int8_order).bfloat16(), rtol=0, atol=0
        )
    assert (got.float() - exact).norm() / exact.norm() < 0.02
    assert isinstance(select("cpu", "float32").prepare(weight), Int8Weight)


def _attention_weights(half: AttentionHalf, layer: int) -> AttentionWeights:
    weights = half.layers[layer].attention._w  # type: ignore[attr-defined]
    assert isinstance(weights, AttentionWeights)
    return weights


@pytest.mark.parametrize("model", ["dummy:step3-tiny", DEFAULT_MODEL])
def test_int8_all_rounds_projections_and_head_alone(model: str) -> None:
    """A mirror of the float32 half; the default model's file has rows in llama.cpp's order and one matrix for both
    embedding and head."""
    folder = resolve_model(model)
    plain, rounded = (
        load_attention_half(folder, select("cpu", "float32"), weights=weights) for weights in ("int8", "int8-all")
    )
    pairs = [(plain._head, rounded._head)]
    for name in ("qkv", "o", "q_up"):
        pairs.append(tuple(getattr(_attention_weights(half, 1), name) for half in (plain, rounded)))
    for matrix, got in pairs:
        if matrix is None:
            assert got is None
            continue
        want = int8_copy(matrix, torch.empty_like(matrix, dtype=torch.int8), 1 << 20)
        assert isinstance(got, Int8Weight)
        assert torch.equal(got.values, want.values) and torch.equal(got.scales, want.scales)
    assert torch.equal(rounded._embedding, plain._embedding)
    assert torch.equal(rounded.layers[1].attn_norm, plain.layers[1].attn_norm)


def test_int8_all_leaves_mla_as_it_is() -> None:
    half = load_attention_half(resolve_model("dummy:deepseek-v3-tiny"), select("cpu", "bfloat16"), weights="int8-all")
    weights = half.layers[0].attention._w  # type: ignore[attr-defined]
    assert not any(isinstance(w, Int8Weight | PackedInt8) for w in (weights.q_up, weights.kv_down, weights.o))
    assert isinstance(half._head, Int8Weight | PackedInt8)


def test_layers_with_int8_weights_are_fused_where_bfloat16_ones_are() -> None:
    folder = resolve_model("dummy:step3-tiny")
    halves = [
        load_attention_half(folder, select("cpu", "bfloat16"), weights=weights) for weights in ("auto", "int8-all")
    ]
    fused = [[layer.fused is not None for layer in half.layers] for half in halves]
    assert fused[0] == fused[1] == [native_ops() is not None] * folder.spec.num_layers
    assert isinstance(halves[1]._head, Packed) == fused[0][0]


@pytest.mark.parametrize("model", ["dummy:step3-tiny", "dummy:llama-tiny"])
@pytest.mark.parametrize("parallel", [FfnParallel.HYBRID, FfnParallel.TP])
def test_int8_halves_stay_close(model: str, parallel: FfnParallel) -> None:
    found = resolve_model(model)
    hidden, top_k = found.spec.hidden, found.spec.max_top_k
    rows = torch.randn(7, hidden)
    for layer in range(found.spec.num_layers):
        routed = found.spec.layers[layer].ffn.router is not None
        ids = torch.randint(8, (7, top_k), dtype=torch.int32) if routed else None
        dispatch = Dispatch(layer, rows, ids, torch.rand(7, top_k) if routed else None)
        whole = load_ffn_half(found, ShardSpec(), select("cpu", "float32")).layer(dispatch)
        parts = [
            load_ffn_half(found, ShardSpec(r, 2, parallel), select("cpu", "float32"), weights="int8").layer(dispatch)
            for r in range(2)
        ]
        error = (sum(parts) - whole).norm() / whole.norm()
        assert 1e-5 < error < 0.02, layer


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="weights 'int4' are not supported"):
        load_ffn_half(resolve_model("dummy:llama-tiny"), ShardSpec(), select("cpu", "float32"), weights="int4")
    with pytest.raises(ModelError, match="weights 'int4' are not supported"):
        load_attention_half(resolve_model("dummy:llama-tiny"), select("cpu", "float32"), weights="int4")


def test_a_shard_without_columns_gives_zeros() -> None:
    """Whatever lay in the memory of its scales."""
    weight = int8_in(torch.empty(6, 0, dtype=torch.int8))
    x = torch.empty(3, 0)
    for ops in (select("cpu", "float32"), select("cpu", "bfloat16")):
        assert torch.equal(ops.linear(x.to(ops.dtype), ops.prepare(weight)).float(), torch.zeros(3, 6))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_rows=st.integers(0, 4), hidden=st.sampled_from([1, 64, 128, 200, 384]), exponent=st.integers(-20, 20))
def test_float8_rows_come_back_within_their_precision(num_rows: int, hidden: int, exponent: int) -> None:
    """Half a step of a 3-bit mantissa; near zero, of the smallest number beside its group's largest."""
    rows = torch.randn(num_rows, hidden) * 2.0**exponent
    values, scales = encode_rows(rows, WireDtype.FP8_E4M3)
    assert values.shape == rows.shape and scales is not None and scales.shape == (num_rows, -(-hidden // 128))
    back = decode_rows(values, scales, torch.float32)
    floor = scales.repeat_interleave(128, dim=1)[:, :hidden] * 2.0**-10
    assert ((back - rows).abs() <= torch.maximum(rows.abs() / 16, floor) * 1.001).all()


def test_rows_in_the_compute_dtype_are_not_copied() -> None:
    rows = torch.randn(3, 8).bfloat16()
    encoded, scales = encode_rows(rows, WireDtype.BF16)
    assert scales is None and encoded.data_ptr() == rows.data_ptr()
    assert decode_rows(encoded, None, torch.bfloat16).data_ptr() == rows.data_ptr()
    assert decode_rows(encoded, None, torch.float32).dtype is torch.float32


def test_a_group_of_zeros_stays_zero() -> None:
    values, scales = encode_rows(torch.zeros(2, 130), WireDtype.FP8_E4M3)
    assert not decode_rows(values, scales, torch.float32).any()
