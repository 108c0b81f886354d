#include "layer.h"

#include <atomic>
#include <cstring>
#include <new>

#include "attention_plan.h"
#include "run.h"

namespace afd {
namespace {

constexpr size_t kBf16Bytes = 2;
constexpr int kSwiGluRows = 64;  // computed together: their intermediate rows stay in the L2 cache

// Consecutive 64-byte aligned parts of one piece of memory; with base null it only adds up what they take.
class Parts {
  public:
    explicit Parts(void* base) : base_(static_cast<char*>(base)) {}
    void* take(size_t bytes) {
        char* const part = base_ == nullptr ? nullptr : base_ + used_;
        used_ += aligned64(bytes);
        return part;
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

Arena& arena() {
    thread_local Arena instance;
    return instance;
}

void* offset(void* rows, int64_t elements) { return static_cast<char*>(rows) + elements * kBf16Bytes; }
const void* offset(const void* rows, int64_t elements) {
    return static_cast<const char*>(rows) + elements * kBf16Bytes;
}

// Scratch of swiglu_rows: gate and up, unless they are taken panel by panel, and their product.
size_t gate_up_bytes(const AfdSwiGlu& f, int rows) {
    return f.width % kPanel == 0 ? 0 : aligned64(sizeof(float) * 2 * f.width * rows);
}
size_t swiglu_bytes(const AfdSwiGlu& f, int rows) { return gate_up_bytes(f, rows) + kBf16Bytes * f.width * rows; }

// silu(gate) * up of at most kSwiGluRows rows, panel by panel: gate and up stay in a cache near by.
void gate_panels(const KernelTable& kernels, const GemmArgs& gate_up, const AfdSwiGlu& f, void* active, int num_threads) {
    const int threads = gemm_threads(gate_up, num_threads);
    const GemmInput input(kernels, gate_up, threads);
    run_ranges(f.width, kPanel, threads, [&](int begin, int end) {
        alignas(64) float sums[kSwiGluRows * 2 * kPanel];
        GemmArgs part = gate_up;
        part.out_stride = 2 * kPanel;
        part.n = kPanel;
        for (int column = begin; column < end; column += kPanel) {
            const AfdMatrix gate = rows_from(f.gate_up, column, f.hidden);
            const AfdMatrix up = rows_from(f.gate_up, f.width + column, f.hidden);
            part.out = sums;
            part.w = gate;
            part.after = up.data;
            input.multiply(part, 0, kPanel);
            part.out = sums + kPanel;
            part.w = up;
            part.after = column + kPanel < end ? rows_from(f.gate_up, column + kPanel, f.hidden).data : f.down.data;
            input.multiply(part, 0, kPanel);
            kernels.silu_mul({sums, sums + kPanel, offset(active, column), 2 * kPanel, f.width, kFloat32, kBfloat16,
                              part.m, kPanel, f.limit},
                             0, part.m);
        }
    });
}

// down(silu(gate) * up) of at most kSwiGluRows rows. Gate and up are not rounded before they meet: in the few rows with
// huge activations their product is most of the output, and of the model's error.
void swiglu_rows(const KernelTable& kernels, const AfdSwiGlu& f, const void* x, int64_t x_stride, int rows, void* memory,
                 void* out, GemmOut mode, int num_threads) {
    float* const sums = static_cast<float*>(memory);
    void* const active = static_cast<char*>(memory) + gate_up_bytes(f, rows);
    const GemmArgs gate_up{x, f.gate_up, sums, x_stride, 2 * f.width, kToFloat32, rows, 2 * f.width, f.hidden};
    if (f.width % kPanel == 0) {
        gate_panels(kernels, gate_up, f, active, num_threads);
    } else {  // up begins in the middle of a panel
        run_gemm(kernels, gate_up, num_threads);
        kernels.silu_mul(
            {sums, sums + f.width, active, 2 * f.width, f.width, kFloat32, kBfloat16, rows, f.width, f.limit}, 0, rows);
    }
    run_gemm(kernels, {active, f.down, out, f.width, f.hidden, mode, rows, f.hidden, f.width}, num_threads);
}

// Row-wise work over [0, num_rows), on more than one thread where there are rows enough to be worth it.
template <class Function>
void run_rows(int num_rows, int num_threads, Function function) {
    constexpr int kRowsPerThread = 16;
    run_ranges(num_rows, 1, std::clamp(num_rows / kRowsPerThread, 1, num_threads), function);
}

// Rows of one norm, float32 or bf16 in, bf16 out.
void norm(const KernelTable& kernels, DType dtype, const void* x, int64_t stride, const float* weight, float eps,
          int num_rows, int width, void* out, int64_t out_stride, int num_threads) {
    // Without partials x is only read.
    const NormArgs args{const_cast<void*>(x), {}, weight, out, stride, out_stride, dtype, kBfloat16, dtype, 0,
                        num_rows, width, eps};
    run_rows(num_rows, num_threads, [&](int begin, int end) { kernels.add_rms_norm(args, begin, end); });
}

struct LayerScratch {
    void *hidden, *projected, *query, *attended;
    size_t bytes;

    LayerScratch(const AfdAttentionLayer& l, int num_tokens, int64_t projected_width, void* memory) {
        Parts parts(memory);
        const size_t row = kBf16Bytes * num_tokens;
        hidden = parts.take(row * l.hidden);
        projected = parts.take(row * projected_width);
        query = parts.take(l.q_rank > 0 ? row * l.num_heads * l.head_dim : 0);
        attended = parts.take(row * l.num_heads * l.v_dim);
        bytes = parts.used();
    }
};

}  // namespace

int32_t swiglu(const KernelTable& kernels, const AfdSwiGlu& ffn, const void* x, int64_t x_stride, int num_rows,
               void* out, int num_threads) {
    const int chunks = (num_rows + kSwiGluRows - 1) / kSwiGluRows;
    // With chunks enough each thread has its own, and does not wait for the others in the middle of them.
    const bool apart = chunks >= num_threads;
    const int items = apart ? (chunks + num_threads - 1) / num_threads * num_threads : chunks;
    std::atomic<bool> out_of_memory{false};
    run_items(items, apart ? num_threads : 1, [&](int item) {
        const int begin = static_cast<int>(static_cast<int64_t>(num_rows) * item / items);
        const int rows = static_cast<int>(static_cast<int64_t>(num_rows) * (item + 1) / items) - begin;
        const size_t bytes = swiglu_bytes(ffn, rows);
        void* const memory = arena().reserve(bytes);
        if (memory == nullptr && bytes > 0) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        try {
            swiglu_rows(kernels, ffn, offset(x, begin * x_stride), x_stride, rows, memory,
                        offset(out, static_cast<int64_t>(begin) * ffn.hidden), kToBfloat16, apart ? 1 : num_threads);
        } catch (const std::bad_alloc&) {  // nothing may leave the body
            out_of_memory.store(true, std::memory_order_relaxed);
        }
    });
    return out_of_memory ? kOutOfMemory : kOk;
}

int32_t run_experts(const KernelTable& kernels, const AfdExperts& e, const Routed& r, int num_threads) {
    const int num_pairs = r.num_rows * r.top_k;
    std::memset(r.counts, 0, sizeof(int32_t) * e.num_local);
    for (int i = 0; i < num_pairs; ++i) {
        const int local = r.ids[i] - e.first;
        if (local >= 0 && local < e.num_local) ++r.counts[local];
    }
    int most = 0;
    for (int local = 0; local < e.num_local; ++local) most = std::max(most, static_cast<int>(r.counts[local]));
    if (most == 0) return kOk;
    const int chunk = std::min(most, kSwiGluRows);

    struct Scratch {
        void *rows, *swiglu, *answers, *starts, *tokens, *scales;
        size_t bytes;
    };
    const auto lay_out = [&](void* memory) {
        Parts parts(memory);
        Scratch s;
        s.rows = parts.take(kBf16Bytes * chunk * e.hidden);
        s.swiglu = parts.take(swiglu_bytes({{}, {}, e.hidden, e.width, e.limit}, chunk));
        s.answers = parts.take(sizeof(float) * chunk * e.hidden);
        s.starts = parts.take(sizeof(int32_t) * (e.num_local + 1));
        s.tokens = parts.take(sizeof(int32_t) * num_pairs);
        s.scales = parts.take(sizeof(float) * num_pairs);
        s.bytes = parts.used();
        return s;
    };
    void* const memory = arena().reserve(lay_out(nullptr).bytes);
    if (memory == nullptr) return kOutOfMemory;
    const Scratch s = lay_out(memory);

    // Counting sort of the (token, expert) pairs by expert; tokens stay in order.
    int32_t* const starts = static_cast<int32_t*>(s.starts);
    int32_t* const tokens = static_cast<int32_t*>(s.tokens);
    float* const scales = static_cast<float*>(s.scales);
    starts[0] = 0;
    for (int local = 0; local < e.num_local; ++local) starts[local + 1] = starts[local] + r.counts[local];
    for (int i = 0; i < num_pairs; ++i) {
        const int local = r.ids[i] - e.first;
        if (local < 0 || local >= e.num_local) continue;
        const int at = starts[local]++;
        tokens[at] = i / r.top_k;
        scales[at] = r.weights[i];
    }  // now starts[local] is where the next one begins

    float* const answers = static_cast<float*>(s.answers);
    for (int local = 0; local < e.num_local; ++local) {
        if (r.squares != nullptr) r.squares[local] = 0;
        const int end = starts[local];
        for (int begin = end - r.counts[local]; begin < end; begin += chunk) {
            const int rows = std::min(chunk, end - begin);
            for (int i = 0; i < rows; ++i)
                std::memcpy(offset(s.rows, static_cast<int64_t>(i) * e.hidden),
                            offset(r.x, static_cast<int64_t>(tokens[begin + i]) * e.hidden), kBf16Bytes * e.hidden);
            const AfdSwiGlu ffn{e.gate_up[local], e.down[local], e.hidden, e.width, e.limit};
            swiglu_rows(kernels, ffn, s.rows, e.hidden, rows, s.swiglu, answers, kToFloat32, num_threads);
            kernels.add_scaled_rows(answers, scales + begin, tokens + begin, rows, e.hidden, r.out);
            if (r.squares == nullptr) continue;
            double sum = 0;
            for (int64_t i = 0; i < static_cast<int64_t>(rows) * e.hidden; ++i)
                sum += static_cast<double>(answers[i]) * answers[i];
            r.squares[local] += sum / e.hidden;
        }
    }
    return kOk;
}

int32_t attention_layer(const KernelTable& kernels, const AfdAttentionLayer& l, const AfdBatch& b, const KvBlocks& kv,
                        const Residual& residual, void* rows, int num_threads, int32_t* error_detail) {
    const int n = b.num_tokens;
    const int q_width = l.num_heads * l.head_dim, k_width = l.num_kv_heads * l.head_dim;
    const int v_width = l.num_kv_heads * l.v_dim, o_width = l.num_heads * l.v_dim;
    const int first_width = l.q_rank > 0 ? l.q_rank : q_width;
    const int k_at = first_width, v_at = k_at + k_width, gate_at = v_at + v_width;
    const int width = gate_at + (l.head_gate ? l.num_heads : 0);

    const size_t scratch_bytes = LayerScratch(l, n, width, nullptr).bytes;
    void* const memory = arena().reserve(scratch_bytes);
    if (memory == nullptr && scratch_bytes > 0) return kOutOfMemory;
    const LayerScratch s(l, n, width, memory);
    void* const query = l.q_rank > 0 ? s.query : s.projected;
    const int64_t q_stride = l.q_rank > 0 ? q_width : width;
    const AttentionArgs attention{query,        kv.k_cache,    kv.v_cache,      s.attended,   b.block_table,
                                  b.seq_lens,   b.query_start, q_stride,      o_width,      b.table_stride,
                                  kBfloat16,    n,            b.num_seqs,     l.num_heads,  l.num_kv_heads,
                                  l.head_dim,   l.v_dim,      kv.num_blocks,   kv.block_size, l.window,
                                  l.scale};
    const BatchCheck check = check_batch(attention);
    if (check.error != BatchError::kNone) {
        error_detail[0] = check.seq;
        error_detail[1] = check.value;
        return static_cast<int32_t>(check.error);
    }
    const int64_t num_slots = static_cast<int64_t>(kv.num_blocks) * kv.block_size;
    if (const int32_t status = check_slots(b.slots, n, num_slots, error_detail)) return status;

    float* const x = residual.x;
    NormArgs first{x, {}, l.attn_norm, s.hidden, l.hidden, l.hidden, kFloat32, kBfloat16, residual.partial_dtype,
                   residual.num_partials, n, l.hidden, l.eps};
    std::copy(residual.partials, residual.partials + residual.num_partials, first.partials);
    run_rows(n, num_threads, [&](int begin, int end) { kernels.add_rms_norm(first, begin, end); });
    GemmArgs qkv{s.hidden, l.qkv, s.projected, l.hidden, width, kToBfloat16, n, width, l.hidden};
    qkv.after = l.q_rank > 0 ? l.q_up.data : l.o.data;
    run_gemm(kernels, qkv, num_threads);
    if (l.qkv_bias != nullptr) kernels.add_bias({s.projected, l.qkv_bias, width, n, gate_at});
    if (l.q_rank > 0) {
        norm(kernels, kBfloat16, s.projected, width, l.q_norm, l.eps, n, l.q_rank, s.projected, width,
             num_threads);
        run_gemm(kernels, {s.projected, l.q_up, query, width, q_width, kToBfloat16, n, q_width, l.q_rank},
                 num_threads);
    }
    if (l.q_head_norm != nullptr)
        for (int t = 0; t < n; ++t) {
            void* const q = offset(query, t * q_stride);
            void* const k = offset(s.projected, static_cast<int64_t>(t) * width + k_at);
            norm(kernels, kBfloat16, q, l.head_dim, l.q_head_norm, l.eps, l.num_heads, l.head_dim, q, l.head_dim, 1);
            norm(kernels, kBfloat16, k, l.head_dim, l.k_head_norm, l.eps, l.num_kv_heads, l.head_dim, k, l.head_dim, 1);
        }
    run_rows(n, num_threads, [&](int begin, int end) {
        const int64_t row = static_cast<int64_t>(begin) * width, angle = static_cast<int64_t>(begin) * l.half;
        kernels.rope_write_kv({offset(query, begin * q_stride), b.cos + angle, b.sin + angle, q_stride, l.num_heads, l.half,
                               l.interleaved},
                              {offset(s.projected, row + k_at), offset(s.projected, row + v_at), kv.k_cache, kv.v_cache,
                               b.slots + begin, width, width, kBfloat16, end - begin, l.num_kv_heads, l.head_dim, l.v_dim,
                               kv.block_size});
    });
    if (const int32_t status = attend(kernels, attention, num_threads, error_detail)) return status;
    if (l.head_gate)
        kernels.gate_heads({s.attended, offset(s.projected, gate_at), width, n, l.num_heads, l.v_dim});
    if (l.o_bias == nullptr) {
        run_gemm(kernels, {s.attended, l.o, x, o_width, l.hidden, kAddToFloat32, n, l.hidden, o_width}, num_threads);
        norm(kernels, kFloat32, x, l.hidden, l.ffn_norm, l.eps, n, l.hidden, rows, l.hidden, num_threads);
        return kOk;
    }
    run_gemm(kernels, {s.attended, l.o, s.hidden, o_width, l.hidden, kToBfloat16, n, l.hidden, o_width}, num_threads);
    kernels.add_bias({s.hidden, l.o_bias, l.hidden, n, l.hidden});
    // The residual takes the biased rows as a partial of the norm that follows.
    kernels.add_rms_norm({x, {s.hidden}, l.ffn_norm, rows, l.hidden, l.hidden, kFloat32, kBfloat16, kBfloat16, 1, n,
                          l.hidden, l.eps},
                         0, n);
    return kOk;
}

}  // namespace afd
