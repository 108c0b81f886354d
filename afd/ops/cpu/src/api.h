// The C interface of the library. Plain pointers and integers; every function may be called from any thread.
//
// `isa` is one of the Isa values and must be available (afd_isa_available). Return value: 0, or an error number that
// afd/ops/cpu/binding.py turns into a sentence. Nothing is kept after the call but the worker threads.
#pragma once

#include <cstdint>

#define AFD_API __attribute__((visibility("default")))

extern "C" {

enum AfdIsa : int32_t { kIsaPortable = 0, kIsaAvx2 = 1, kIsaAvx512 = 2 };

// All that is declared here, as it was compiled: lines of name=value (abi.cpp). The loader refuses a library whose
// functions, structures or constants differ from its own. Lives as long as the library.
AFD_API const char* afd_abi();
AFD_API int32_t afd_isa_available(int32_t isa);

AFD_API int32_t afd_paged_attention(int32_t isa, int32_t num_threads, int32_t dtype, const void* q, const void* k_cache,
                                    const void* v_cache, void* out, const int32_t* block_table, const int32_t* seq_lens,
                                    const int32_t* query_start, int64_t q_stride, int64_t out_stride,
                                    int64_t table_stride, int32_t num_tokens, int32_t num_seqs, int32_t num_heads,
                                    int32_t num_kv_heads, int32_t head_dim, int32_t v_dim, int32_t num_blocks,
                                    int32_t block_size, int32_t window, float scale,
                                    int32_t* error_detail /* [2]: sequence, value */);

AFD_API int32_t afd_rope_write_kv(int32_t isa, int32_t dtype, void* q, const void* k, const void* v, const float* cos,
                                  const float* sin, void* k_cache, void* v_cache, const int64_t* slots,
                                  int64_t q_stride, int64_t k_stride, int64_t v_stride, int32_t num_tokens,
                                  int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t v_dim,
                                  int32_t half, int32_t interleaved, int32_t num_blocks, int32_t block_size,
                                  int32_t* error_detail /* [2]: token, 0 */);

AFD_API int32_t afd_add_rms_norm(int32_t isa, int32_t dtype, int32_t out_dtype, int32_t partial_dtype, void* x,
                                 const void* const* partials, int32_t num_partials, const float* weight, void* out,
                                 int32_t num_rows, int32_t width, float eps);

AFD_API int32_t afd_silu_mul(int32_t isa, int32_t dtype, const void* gate_up, void* out, int64_t in_stride,
                             int64_t out_stride, int32_t num_rows, int32_t width, float limit);

// largest, idx [num_rows]: each row's first NaN, or else its first largest element, and its place. x: rows `stride` apart.
AFD_API void afd_row_max(int32_t isa, int32_t num_threads, const float* x, int64_t stride, int32_t num_rows, int32_t width,
                         float* largest, int64_t* idx);

// How the token of one row of logits is drawn (docs/sampling.md). No list may name a token outside the vocabulary.
struct AfdSampleRow {
    const int32_t *prompt, *output;  // for the penalties; empty where there are none
    const int32_t* bias_ids;
    const float* biases;
    const int32_t* masked;  // tokens that must not be drawn
    int32_t num_prompt, num_output, num_biases, num_masked;
    uint64_t seed;
    uint32_t position, choice;
    double top_p, frequency, presence;
    float repetition, scale;  // scale: log2(e) / temperature; 0 = the largest
    int32_t top_k;            // 0 = all
    int32_t least;            // min_p: tokens of a lesser mass are left out
    int32_t num_logprobs;     // -1 = none; else the token's, and so many of the most likely ones
};
struct AfdSampled {
    int64_t* tokens;   // [num_rows], -1 where a row has a NaN or no finite largest logit
    double* logprobs;  // [num_rows, 1 + num_top]: the token's, then the most likely ones'
    int32_t* top_ids;  // [num_rows, num_top]
    int32_t num_top;   // at least every num_logprobs
};
AFD_API int32_t afd_sample(int32_t isa, int32_t num_threads, const float* logits, int64_t stride, int32_t width,
                           const AfdSampleRow* rows, int32_t num_rows, const AfdSampled* out,
                           int32_t* error_detail /* [2]: row, token */);

// out [m, k] float32: rows idx of packed weights [n, k].
AFD_API void afd_unpack_rows(int32_t num_threads, const void* weights, int32_t n, int32_t k, const int64_t* idx, int32_t m,
                             float* out);

// bf16 weights [n, k] (k even) into the order of gemm.h and back, in their place.
AFD_API void afd_pack(void* weights, int32_t n, int32_t k, int32_t unpack);

// A packed matrix: bf16 in the order of gemm.h (scales null), or int8 in that of gemm_int8.h with a scale of each row.
struct AfdMatrix {
    const void* data;
    const float* scales;
};

// mode: 0 = out is float32, 1 = out is bf16, 2 = added to a float32 out.
AFD_API int32_t afd_gemm(int32_t isa, int32_t num_threads, const void* x, const AfdMatrix* w, void* out, int32_t mode,
                         int64_t x_stride, int64_t out_stride, int32_t m, int32_t n, int32_t k);
// Goes on with the same of columns [begin, end) of x [m, k] . w^T in float32, which is not kept; begin is a multiple of
// the rows of a panel of w.
AFD_API int32_t afd_gemm_row_max(int32_t isa, int32_t num_threads, const void* x, const AfdMatrix* w, float* largest,
                                 int64_t* idx, int64_t x_stride, int32_t m, int32_t begin, int32_t end, int32_t k);

// down(silu(gate(x)) * up(x)).
struct AfdSwiGlu {
    AfdMatrix gate_up;  // [2 * width, hidden]
    AfdMatrix down;     // [hidden, width]
    int32_t hidden, width;
    float limit;  // of the clamped form, 0 = none
};
AFD_API int32_t afd_swiglu(int32_t isa, int32_t num_threads, const AfdSwiGlu* ffn, const void* x, int64_t x_stride,
                           int32_t num_rows, void* out /* bf16 [num_rows, hidden] */);

// The experts [first, first + num_local) of an MoE layer, all of one shape.
struct AfdExperts {
    const AfdMatrix* gate_up;  // [num_local]
    const AfdMatrix* down;
    int32_t first, num_local, hidden, width;
    float limit;
};
// out [num_rows, hidden] += weights * expert(x) for the routings to local experts, in the experts' order.
// counts [num_local]: rows of each.  squares [num_local], or null: the sum of their outputs' mean squares, unweighted.
AFD_API int32_t afd_experts(int32_t isa, int32_t num_threads, const AfdExperts* experts, const void* x,
                            const int32_t* ids, const float* weights, int32_t num_rows, int32_t top_k, float* out,
                            int32_t* counts, double* squares);

// Attention of one layer with rotary positions: GQA, or MFA where q_rank > 0. bf16 biases and KV; null = not there.
struct AfdAttentionLayer {
    const float *attn_norm, *ffn_norm;          // [hidden]
    AfdMatrix qkv;                              // [(q_rank or q width) + k width + v width (+ num_heads), hidden]
    const void* qkv_bias;                       // [q + k + v width]
    const float* q_norm;                        // [q_rank]
    AfdMatrix q_up;                             // [q width, q_rank]
    const float *q_head_norm, *k_head_norm;     // [head_dim]
    AfdMatrix o;                                // [hidden, num_heads * v_dim]
    const void* o_bias;                         // [hidden]
    int32_t hidden, q_rank, num_heads, num_kv_heads, head_dim, v_dim, head_gate, half, interleaved, window;
    float scale, eps;
};
struct AfdBatch {
    const float *cos, *sin;      // [num_tokens, half]
    const int64_t* slots;        // [num_tokens]
    const int32_t* block_table;  // [num_seqs, table_stride]
    const int32_t* seq_lens;
    const int32_t* query_start;
    int64_t table_stride;
    int32_t num_tokens, num_seqs;
};
// x [num_tokens, hidden] += the partials, in order; then x += o(attention(attn_norm(x))), where K and V of these tokens
// are stored; rows = ffn_norm(x), bf16.
AFD_API int32_t afd_attention_layer(int32_t isa, int32_t num_threads, const AfdAttentionLayer* layer,
                                    const AfdBatch* batch, void* k_cache, void* v_cache, int32_t num_blocks,
                                    int32_t block_size, float* x, const void* const* partials, int32_t num_partials,
                                    int32_t partial_dtype, void* rows,
                                    int32_t* error_detail /* [2], as of afd_paged_attention or afd_rope_write_kv */);

// Sum of `num_bytes` bytes read as floats by num_threads threads: the read bandwidth the kernels are measured against.
AFD_API float afd_read_memory(int32_t isa, int32_t num_threads, const void* memory, int64_t num_bytes);

AFD_API void afd_start_workers(int32_t num_threads);
AFD_API void afd_stop_workers();
AFD_API int32_t afd_num_workers();
}
