#include "api.h"

#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "layer.h"
#include "run.h"
#include "sample.h"

namespace afd {

extern const KernelTable kernels_portable;
extern const SampleTable sample_portable;
#if defined(AFD_HAVE_X86)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const SampleTable sample_avx2;
extern const SampleTable sample_avx512;
#endif

const KernelTable& table_of(int32_t isa) {
#if defined(AFD_HAVE_X86)
    if (isa == kIsaAvx512) return kernels_avx512;
    if (isa == kIsaAvx2) return kernels_avx2;
#endif
    static_cast<void>(isa);
    return kernels_portable;
}

namespace {

const SampleTable& sample_table_of(int32_t isa) {
#if defined(AFD_HAVE_X86)
    if (isa == kIsaAvx512) return sample_avx512;
    if (isa == kIsaAvx2) return sample_avx2;
#endif
    static_cast<void>(isa);
    return sample_portable;
}

}  // namespace
}  // namespace afd

using namespace afd;

int32_t afd_isa_available(int32_t isa) {
#if defined(AFD_HAVE_X86)
    // GCC's and Clang's test includes the operating system's support (XGETBV).
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == kIsaAvx2) return avx2;
    if (isa == kIsaAvx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
    return isa == kIsaPortable;
}

int32_t afd_paged_attention(int32_t isa, int32_t num_threads, int32_t dtype, const void* q, const void* k_cache,
                            const void* v_cache, void* out, const int32_t* block_table, const int32_t* seq_lens,
                            const int32_t* query_start, int64_t q_stride, int64_t out_stride, int64_t table_stride,
                            int32_t num_tokens, int32_t num_seqs, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t v_dim, int32_t num_blocks, int32_t block_size, int32_t window,
                            float scale, int32_t* error_detail) {
    const AttentionArgs args{q,           k_cache,   v_cache,      out,          block_table, seq_lens,
                             query_start, q_stride,  out_stride,   table_stride, dtype,       num_tokens,
                             num_seqs,    num_heads, num_kv_heads, head_dim,     v_dim,       num_blocks,
                             block_size,  window,    scale};
    return guarded([&] { return attend(table_of(isa), args, num_threads, error_detail); });
}

int32_t afd_rope_write_kv(int32_t isa, int32_t dtype, void* q, const void* k, const void* v, const float* cos,
                          const float* sin, void* k_cache, void* v_cache, const int64_t* slots, int64_t q_stride,
                          int64_t k_stride, int64_t v_stride, int32_t num_tokens, int32_t num_heads,
                          int32_t num_kv_heads, int32_t head_dim, int32_t v_dim, int32_t half, int32_t interleaved,
                          int32_t num_blocks, int32_t block_size, int32_t* error_detail) {
    const int32_t status = check_slots(slots, num_tokens, static_cast<int64_t>(num_blocks) * block_size, error_detail);
    if (status != kOk) return status;
    table_of(isa).rope_write_kv({q, cos, sin, q_stride, num_heads, half, interleaved},
                                {k, v, k_cache, v_cache, slots, k_stride, v_stride, dtype, num_tokens, num_kv_heads,
                                 head_dim, v_dim, block_size});
    return kOk;
}

int32_t afd_add_rms_norm(int32_t isa, int32_t dtype, int32_t out_dtype, int32_t partial_dtype, void* x,
                         const void* const* partials, int32_t num_partials, const float* weight, void* out,
                         int32_t num_rows, int32_t width, float eps) {
    NormArgs args{x,     {},        weight,        out,          width,    width, dtype,
                  out_dtype, partial_dtype, num_partials, num_rows, width, eps};
    for (int i = 0; i < num_partials; ++i) args.partials[i] = partials[i];
    table_of(isa).add_rms_norm(args, 0, num_rows);
    return kOk;
}

int32_t afd_silu_mul(int32_t isa, int32_t dtype, const void* gate_up, void* out, int64_t in_stride, int64_t out_stride,
                     int32_t num_rows, int32_t width, float limit) {
    const void* const up = static_cast<const char*>(gate_up) + (dtype == kFloat32 ? 4 : 2) * static_cast<int64_t>(width);
    table_of(isa).silu_mul({gate_up, up, out, in_stride, out_stride, dtype, dtype, num_rows, width, limit}, 0, num_rows);
    return kOk;
}

void afd_pack(void* weights, int32_t n, int32_t k, int32_t unpack) {
    uint32_t* const pairs = static_cast<uint32_t*>(weights);
    const int num_pairs = k / 2;
    std::vector<uint32_t> panel(static_cast<size_t>(std::min(n, kPanel)) * num_pairs);
    for (int begin = 0; begin < n; begin += kPanel) {
        const int width = std::min(kPanel, n - begin);
        uint32_t* const at = pairs + static_cast<int64_t>(begin) * num_pairs;
        std::memcpy(panel.data(), at, sizeof(uint32_t) * width * num_pairs);
        for (int row = 0; row < width; ++row)
            for (int i = 0; i < num_pairs; ++i) {
                const int64_t packed = static_cast<int64_t>(i) * width + row;
                const int64_t plain = static_cast<int64_t>(row) * num_pairs + i;
                if (unpack)
                    at[plain] = panel[packed];
                else
                    at[packed] = panel[plain];
            }
    }
}

void afd_row_max(int32_t isa, int32_t num_threads, const float* x, int64_t stride, int32_t num_rows, int32_t width,
                 float* largest, int64_t* idx) {
    RowMaxima{largest, idx}.clear(num_rows);
    const RowMaxArgs args{x, largest, idx, stride, 0, num_rows, width};
    run_ranges(num_rows, 1, num_threads, [&](int begin, int end) { table_of(isa).row_max(args, begin, end); });
}

int32_t afd_sample(int32_t isa, int32_t num_threads, const float* logits, int64_t stride, int32_t width,
                   const AfdSampleRow* rows, int32_t num_rows, const AfdSampled* out, int32_t* error_detail) {
    const int32_t status = check_tokens(rows, num_rows, width, error_detail);
    if (status != kOk) return status;
    return guarded([&] {
        sample(sample_table_of(isa), logits, stride, width, rows, num_rows, *out, num_threads);
        return kOk;
    });
}

void afd_unpack_rows(int32_t num_threads, const void* weights, int32_t n, int32_t k, const int64_t* idx, int32_t m,
                     float* out) {
    const uint32_t* const pairs = static_cast<const uint32_t*>(weights);
    const int num_pairs = k / 2;
    // A row's pairs lie in as many lines of memory.
    run_ranges(m, 1, num_threads, [&](int first, int last) {
        for (int row = first; row < last; ++row) {
            const int64_t begin = idx[row] / kPanel * kPanel;
            const int64_t width = std::min<int64_t>(kPanel, n - begin);
            const uint32_t* from = pairs + begin * num_pairs + (idx[row] - begin);
            float* to = out + static_cast<int64_t>(row) * k;
            for (int i = 0; i < num_pairs; ++i, from += width, to += 2) {
                const uint32_t wide[2] = {*from << 16, *from & 0xffff0000u};  // a bf16 is the first half of a float
                std::memcpy(to, wide, sizeof wide);
            }
        }
    });
}

int32_t afd_gemm(int32_t isa, int32_t num_threads, const void* x, const AfdMatrix* w, void* out, int32_t mode,
                 int64_t x_stride, int64_t out_stride, int32_t m, int32_t n, int32_t k) {
    return guarded([&] {
        run_gemm(table_of(isa), {x, *w, out, x_stride, out_stride, mode, m, n, k}, num_threads);
        return kOk;
    });
}

int32_t afd_gemm_row_max(int32_t isa, int32_t num_threads, const void* x, const AfdMatrix* w, float* largest,
                         int64_t* idx, int64_t x_stride, int32_t m, int32_t begin, int32_t end, int32_t k) {
    return guarded([&] {
        const GemmArgs args{x, rows_from(*w, begin, k), nullptr, x_stride, 0, kToFloat32, m, end - begin, k};
        run_gemm_row_max(table_of(isa), args, {largest, idx}, begin, num_threads);
        return kOk;
    });
}

int32_t afd_swiglu(int32_t isa, int32_t num_threads, const AfdSwiGlu* ffn, const void* x, int64_t x_stride,
                   int32_t num_rows, void* out) {
    return guarded([&] { return swiglu(table_of(isa), *ffn, x, x_stride, num_rows, out, num_threads); });
}

int32_t afd_experts(int32_t isa, int32_t num_threads, const AfdExperts* experts, const void* x, const int32_t* ids,
                    const float* weights, int32_t num_rows, int32_t top_k, float* out, int32_t* counts,
                    double* squares) {
    const Routed routed{x, ids, weights, num_rows, top_k, out, counts, squares};
    return guarded([&] { return run_experts(table_of(isa), *experts, routed, num_threads); });
}

int32_t afd_attention_layer(int32_t isa, int32_t num_threads, const AfdAttentionLayer* layer, const AfdBatch* batch,
                            void* k_cache, void* v_cache, int32_t num_blocks, int32_t block_size, float* x,
                            const void* const* partials, int32_t num_partials, int32_t partial_dtype, void* rows,
                            int32_t* error_detail) {
    Residual residual{x, {}, num_partials, static_cast<DType>(partial_dtype)};
    for (int i = 0; i < num_partials; ++i) residual.partials[i] = partials[i];
    const KvBlocks kv{k_cache, v_cache, num_blocks, block_size};
    return guarded([&] {
        return attention_layer(table_of(isa), *layer, *batch, kv, residual, rows, num_threads, error_detail);
    });
}

float afd_read_memory(int32_t isa, int32_t num_threads, const void* memory, int64_t num_bytes) {
    std::atomic<float> total{0};
    const KernelTable& kernels = table_of(isa);
    constexpr int kGrainBytes = 1 << 20;
    run_ranges(static_cast<int>(num_bytes / kGrainBytes), 1, num_threads, [&](int begin, int end) {
        const char* p = static_cast<const char*>(memory);
        const float sum = kernels.read(p + static_cast<int64_t>(begin) * kGrainBytes,
                                       static_cast<int64_t>(end - begin) * kGrainBytes);
        float seen = total.load();
        while (!total.compare_exchange_weak(seen, seen + sum)) {
        }
    });
    return total;
}

void afd_start_workers(int32_t num_threads) { start_workers(num_threads); }

void afd_stop_workers() { stop_workers(); }

int32_t afd_num_workers() { return num_workers(); }
