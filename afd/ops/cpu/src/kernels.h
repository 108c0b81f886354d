// What the instruction-set independent part hands to the kernels: plain arguments and one table of functions per
// instruction set. Sizes are in elements unless the name says bytes; all pointers stay owned by the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"

namespace afd {

enum DType : int32_t { kFloat32 = 0, kBfloat16 = 1 };

constexpr int kKeyGroup = 8;     // keys that are certain to lie side by side in one block
constexpr int kChunkKeys = 512;  // keys summed up before a merge; fixed, so that no result depends on the work split
constexpr int kMaxRows = 64;     // query rows of a tile
constexpr int kMaxPartials = 16;
constexpr int kPanel = 64;      // rows of a bf16 weight matrix that are packed together (gemm.h)
constexpr int kInt8Panel = 32;  // of an int8 one (gemm_int8.h, gemm_vnni.h); divides kPanel

struct AttentionArgs {
    const void* q;               // [num_tokens, num_heads, head_dim], tokens q_stride apart
    const void* k_cache;         // [num_blocks, num_kv_heads, block_size, head_dim]
    const void* v_cache;         // [num_blocks, num_kv_heads, block_size, v_dim]
    void* out;                   // [num_tokens, num_heads, v_dim], tokens out_stride apart
    const int32_t* block_table;  // [num_seqs, table_stride]
    const int32_t* seq_lens;     // [num_seqs], this step's tokens included
    const int32_t* query_start;  // [num_seqs + 1]
    int64_t q_stride, out_stride, table_stride;
    int32_t dtype, num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, v_dim, num_blocks, block_size, window;
    float scale;
};

// Query rows that go over the same keys: `num_tokens` consecutive tokens of one sequence x `num_kv_heads` KV heads x
// `num_heads` query heads of each. Rows are ordered by KV head, then token, then head.
struct AttentionTile {
    int32_t seq, token_begin, num_tokens, first_position;
    int32_t kv_head, num_kv_heads;   // the first KV head, and how many
    int32_t head_begin, num_heads;   // the first query head, and how many there are for each KV head
    int32_t key_begin, key_end;      // keys that any row sees
    int32_t chunk_begin, chunk_end;  // the chunks of kChunkKeys keys they lie in
    int rows_per_kv_head() const { return num_tokens * num_heads; }
    int num_rows() const { return rows_per_kv_head() * num_kv_heads; }
    int token_of(int row) const { return token_begin + row % rows_per_kv_head() / num_heads; }
    int head_of(int row) const { return head_begin + row / rows_per_kv_head() * num_heads + row % num_heads; }
    int num_chunks() const { return chunk_end - chunk_begin; }
};

// Keys [begin, end) of a tile; without a tile (null), nothing. A kernel is told which it will probably read next.
struct TileRange {
    const AttentionTile* tile;
    int32_t begin, end;
};

// Running softmax of a tile: per row the maximum (log2 domain), the sum, and the weighted values.
struct SoftmaxState {
    float *max, *sum, *acc;  // [kMaxRows], [kMaxRows], [rows, v_padded]
};

struct NormArgs {
    void* x;                             // [num_rows, width], rows x_stride apart; partials are added in place, in order
    const void* partials[kMaxPartials];  // each [num_rows, width]
    const float* weight;                 // [width]
    void* out;                           // [num_rows, width], rows out_stride apart
    int64_t x_stride, out_stride;
    int32_t dtype, out_dtype, partial_dtype, num_partials, num_rows, width;  // out_dtype: dtype, or bf16 of float32
    float eps;
};

struct KvWriteArgs {
    const void *k, *v;        // [num_tokens, num_kv_heads, head_dim | v_dim], tokens k_stride, v_stride apart
    void *k_cache, *v_cache;  // as in AttentionArgs
    const int64_t* slots;     // [num_tokens]: block * block_size + offset, negative to skip
    int64_t k_stride, v_stride;
    int32_t dtype, num_tokens, num_kv_heads, head_dim, v_dim, block_size;
};

struct RopeArgs {
    void* q;                 // [num_tokens, num_heads, head_dim], rotated in place
    const float *cos, *sin;  // [num_tokens, half]
    int64_t q_stride;
    int32_t num_heads, half, interleaved;
};

struct SiluMulArgs {
    const void *gate, *up;  // [num_rows, width], rows in_stride apart
    void* out;              // [num_rows, width]
    int64_t in_stride, out_stride;
    int32_t dtype, out_dtype, num_rows, width;  // out_dtype: dtype, or bf16 of float32
    float limit;  // > 0: min(silu(gate), limit) * clamp(up, -limit, limit)
};

struct BiasArgs {
    void* rows;        // bf16 [num_rows, width], rows `stride` apart; bias is added in place
    const void* bias;  // bf16 [width]
    int64_t stride;
    int32_t num_rows, width;
};

struct HeadGateArgs {
    void* heads;        // bf16 [num_rows, num_heads, dim], multiplied in place by
    const void* gates;  // sigmoid of bf16 [num_rows, num_heads], rows gate_stride apart
    int64_t gate_stride;
    int32_t num_rows, num_heads, dim;
};

enum GemmOut : int32_t { kToFloat32 = 0, kToBfloat16 = 1, kAddToFloat32 = 2 };

struct GemmArgs {
    const void* x;  // bf16 [m, k], rows x_stride apart
    AfdMatrix w;    // [n, k]
    void* out;      // [m, n], rows out_stride apart
    int64_t x_stride, out_stride;
    int32_t mode, m, n, k;  // mode: a GemmOut; k even if w is bf16
    const void* after = nullptr;  // a panel of weights that will be read next, to be fetched meanwhile; null = none
};

struct RowMaxArgs {
    const float* x;  // [num_rows, width], rows `stride` apart
    float* largest;  // [num_rows], and
    int64_t* idx;    // its place: what was found so far
    int64_t stride, first;  // first: the place of column 0
    int32_t num_rows, width;
};

// k of int8 weights, with the zeros that fill their last four. static: files are compiled for different processors.
static inline int int8_depth(int k) { return (k + 3) / 4 * 4; }

// Functions without state; each may run on any thread.
struct KernelTable {
    const char* name;
    // Floats of one SoftmaxState, and bytes of the scratch of attention_chunks (64-byte aligned).
    size_t (*state_floats)(const AttentionArgs&);
    size_t (*scratch_bytes)(const AttentionArgs&);
    SoftmaxState (*state_at)(const AttentionArgs&, float* memory);
    // Chunks [begin, end) of a tile, merged in order into `state`.
    void (*attention_chunks)(const AttentionArgs&, const AttentionTile&, int begin, int end, const TileRange& next,
                             SoftmaxState state, void* scratch);
    void (*merge)(const AttentionArgs&, int num_rows, SoftmaxState into, SoftmaxState from);
    void (*finish)(const AttentionArgs&, const AttentionTile&, SoftmaxState state);
    void (*rope_write_kv)(const RopeArgs&, const KvWriteArgs&);
    void (*add_rms_norm)(const NormArgs&, int row_begin, int row_end);
    void (*silu_mul)(const SiluMulArgs&, int row_begin, int row_end);
    void (*add_bias)(const BiasArgs&);
    void (*gate_heads)(const HeadGateArgs&);
    // out[row] += scale[row] * x[row] for float32 rows of `width`; out row r is out + index[r] * width.
    void (*add_scaled_rows)(const float* x, const float* scale, const int32_t* index, int num_rows, int width,
                            float* out);
    // Each row's first NaN, or else its first largest element, among what was found so far and x.
    void (*row_max)(const RowMaxArgs&, int row_begin, int row_end);
    void (*gemm)(const GemmArgs&, int n_begin, int n_end);  // bf16 weights
    // Int8 weights. x rounded for them: its bytes; some rows of it; what multiplies it.
    size_t (*rounded_bytes)(int m, int k);
    void (*round_rows)(const GemmArgs&, void* rounded, int row_begin, int row_end);
    void (*gemm_int8)(const GemmArgs&, const void* rounded, int n_begin, int n_end);
    // Sum of a multiple of 1 KiB of floats: the plainest way to read memory.
    float (*read)(const char* memory, int64_t num_bytes);
};

}  // namespace afd
