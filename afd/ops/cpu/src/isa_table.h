// The kernels of one instruction set as a table. Included once by each isa_*.cpp, compiled with that set's flags.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#if AFD_LANES == 16
#include "gemm_vnni.h"
#else
#include "gemm_int8.h"
#endif

namespace AFD_ISA {
namespace {

using afd::kBfloat16;

size_t state_floats(const AttentionArgs& a) { return static_cast<size_t>(kMaxRows) * (2 + padded(a.v_dim)); }

size_t scratch_bytes(const AttentionArgs& a) {
    return a.dtype == kBfloat16 ? Scratch<bf16>::bytes(a) : Scratch<float>::bytes(a);
}

SoftmaxState state_at(const AttentionArgs&, float* memory) { return make_state(memory); }

void attention_chunks(const AttentionArgs& a, const AttentionTile& t, int begin, int end, const afd::TileRange& next,
                      SoftmaxState state, void* scratch) {
    if (a.dtype == kBfloat16)
        attend_chunks<bf16>(a, t, begin, end, next, state, scratch);
    else
        attend_chunks<float>(a, t, begin, end, next, state, scratch);
}

void finish(const AttentionArgs& a, const AttentionTile& t, SoftmaxState state) {
    if (a.dtype == kBfloat16)
        write_rows<bf16>(a, t, state);
    else
        write_rows<float>(a, t, state);
}

void rope_write_kv_any(const afd::RopeArgs& r, const afd::KvWriteArgs& a) {
    if (a.dtype == kBfloat16)
        rope_write_kv<bf16>(r, a);
    else
        rope_write_kv<float>(r, a);
}

void add_rms_norm_any(const afd::NormArgs& a, int row_begin, int row_end) {
    const bool x = a.dtype == kBfloat16, partial = a.partial_dtype == kBfloat16, narrow = a.out_dtype == kBfloat16;
    if (x && partial)
        add_rms_norm<bf16, bf16, bf16>(a, row_begin, row_end);
    else if (x)
        add_rms_norm<bf16, float, bf16>(a, row_begin, row_end);
    else if (partial && narrow)
        add_rms_norm<float, bf16, bf16>(a, row_begin, row_end);
    else if (partial)
        add_rms_norm<float, bf16, float>(a, row_begin, row_end);
    else if (narrow)
        add_rms_norm<float, float, bf16>(a, row_begin, row_end);
    else
        add_rms_norm<float, float, float>(a, row_begin, row_end);
}

void silu_mul_any(const afd::SiluMulArgs& a, int row_begin, int row_end) {
    if (a.dtype == kBfloat16)
        silu_mul<bf16, bf16>(a, row_begin, row_end);
    else if (a.out_dtype == kBfloat16)
        silu_mul<float, bf16>(a, row_begin, row_end);
    else
        silu_mul<float, float>(a, row_begin, row_end);
}

void gemm_any(const afd::GemmArgs& a, int n_begin, int n_end) {
    if (a.mode == afd::kToBfloat16)
        gemm<ToBf16>(a, n_begin, n_end);
    else if (a.mode == afd::kToFloat32)
        gemm<ToFloat>(a, n_begin, n_end);
    else
        gemm<AddToFloat>(a, n_begin, n_end);
}

void gemm_int8_any(const afd::GemmArgs& a, const void* rounded, int n_begin, int n_end) {
    if (a.mode == afd::kToBfloat16)
        gemm_int8<ToBf16>(a, rounded, n_begin, n_end);
    else if (a.mode == afd::kToFloat32)
        gemm_int8<ToFloat>(a, rounded, n_begin, n_end);
    else
        gemm_int8<AddToFloat>(a, rounded, n_begin, n_end);
}

float read_memory(const char* memory, int64_t num_bytes) {
    Chunk sums[2] = {};
    const float* p = reinterpret_cast<const float*>(memory);
    const float* const end = p + num_bytes / 4;
    for (; p < end; p += 2 * kChunk)
        for (int i = 0; i < 2; ++i) sums[i] = sums[i] + load(p + i * kChunk);
    const Chunk sum = sums[0] + sums[1];
    return sum_of(sum.a + sum.b);
}

constexpr afd::KernelTable make_table(const char* name) {
    return {name,          state_floats, scratch_bytes,     state_at,         attention_chunks,
            merge_states,  finish,       rope_write_kv_any, add_rms_norm_any, silu_mul_any,
            add_bias,      gate_heads,   add_scaled_rows,   row_max,          gemm_any,
            Rounded::bytes, round_rows,  gemm_int8_any,     read_memory};
}

}  // namespace
}  // namespace AFD_ISA
