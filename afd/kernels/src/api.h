// The C interface of the library. Plain pointers and integers; every function may be called from any thread.
//
// `isa` is one of the Isa values and must be available (afd_isa_available). Return value: 0, or an error number that
// afd/kernels/native.py turns into a sentence. Nothing is kept after the call but the worker threads.
#pragma once

#include <cstdint>

#define AFD_API __attribute__((visibility("default")))

extern "C" {

enum AfdIsa : int32_t { kIsaPortable = 0, kIsaAvx2 = 1, kIsaAvx512 = 2 };

// Changes whenever a signature here does: the loader refuses a library built from other sources.
AFD_API int32_t afd_abi_version();
AFD_API int32_t afd_isa_available(int32_t isa);

AFD_API int32_t afd_paged_attention(int32_t isa, int32_t num_threads, int32_t dtype, const void* q, const void* k_cache,
                                    const void* v_cache, void* out, const int32_t* block_table, const int32_t* seq_lens,
                                    const int32_t* query_start, int64_t q_stride, int64_t out_stride,
                                    int64_t table_stride, int32_t num_tokens, int32_t num_seqs, int32_t num_heads,
                                    int32_t num_kv_heads, int32_t head_dim, int32_t v_dim, int32_t num_blocks,
                                    int32_t block_size, int32_t window, float scale,
                                    int32_t* error_detail /* [2]: sequence, value */);

AFD_API int32_t afd_write_kv(int32_t isa, int32_t dtype, const void* k, const void* v, void* k_cache, void* v_cache,
                             const int64_t* slots, int64_t k_stride, int64_t v_stride, int32_t num_tokens,
                             int32_t num_kv_heads, int32_t head_dim, int32_t v_dim, int32_t num_blocks,
                             int32_t block_size, int32_t* error_detail /* [2]: token, 0 */);

AFD_API int32_t afd_rope_write_kv(int32_t isa, int32_t dtype, void* q, const void* k, const void* v, const float* cos,
                                  const float* sin, void* k_cache, void* v_cache, const int64_t* slots,
                                  int64_t q_stride, int64_t k_stride, int64_t v_stride, int32_t num_tokens,
                                  int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t v_dim,
                                  int32_t half, int32_t interleaved, int32_t num_blocks, int32_t block_size,
                                  int32_t* error_detail /* [2]: token, 0 */);

AFD_API int32_t afd_add_rms_norm(int32_t isa, int32_t dtype, int32_t partial_dtype, void* x,
                                 const void* const* partials, int32_t num_partials, const float* weight, void* out,
                                 int32_t num_rows, int32_t width, float eps);

AFD_API int32_t afd_silu_mul(int32_t isa, int32_t dtype, const void* gate_up, void* out, int64_t in_stride,
                             int64_t out_stride, int32_t num_rows, int32_t width, float limit);

AFD_API int32_t afd_gemm_bf16(int32_t isa, int32_t num_threads, const void* x, const void* w, void* out,
                              int32_t out_dtype, int64_t x_stride, int64_t w_stride, int64_t out_stride, int32_t m,
                              int32_t n, int32_t k);

// Sum of `num_bytes` bytes read as floats by num_threads threads: the read bandwidth the kernels are measured against.
AFD_API float afd_read_memory(int32_t isa, int32_t num_threads, const void* memory, int64_t num_bytes);

AFD_API void afd_stop_workers();
AFD_API int32_t afd_num_workers();
}
