#include "api.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "attention_plan.h"
#include "kernels.h"
#include "thread_pool.h"

namespace afd {

extern const KernelTable kernels_portable;
#if defined(AFD_HAVE_X86)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
#endif

namespace {

constexpr int32_t kAbiVersion = 1;

enum Status : int32_t {
    kOk = 0,  // 1..4 are BatchError
    kSlotOutOfRange = 10,
    kOutOfMemory = 20,
};

const KernelTable& table_of(int32_t isa) {
#if defined(AFD_HAVE_X86)
    if (isa == kIsaAvx512) return kernels_avx512;
    if (isa == kIsaAvx2) return kernels_avx2;
#endif
    static_cast<void>(isa);
    return kernels_portable;
}

// A thread's working memory: grows to the largest call it has seen, freed when the thread ends.
class Arena {
  public:
    ~Arena() { std::free(memory_); }

    // 64-byte aligned, uninitialised; null if there is no memory.
    void* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, size_);
            if (memory_ == nullptr) size_ = 0;
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

size_t aligned64(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct AttentionJob {
    const KernelTable& kernels;
    const AttentionArgs& args;
    const AttentionPlan& plan;
    float* states;
    size_t state_floats, scratch_bytes;
    std::unique_ptr<std::atomic<int>[]> chunks_left;  // per state index of a split tile's first chunk
    std::atomic<bool> out_of_memory{false};

    SoftmaxState state(int index) const { return kernels.state_at(args, states + index * state_floats); }

    void run(int index) {
        const AttentionItem& item = plan.items[index];
        const AttentionTile& tile = plan.tiles[item.tile];
        thread_local Arena arena;
        char* memory = static_cast<char*>(arena.reserve(scratch_bytes + state_floats * sizeof(float)));
        if (memory == nullptr) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        if (item.first_state < 0) {
            const SoftmaxState own = kernels.state_at(args, reinterpret_cast<float*>(memory + scratch_bytes));
            kernels.attention_chunks(args, tile, item.chunk_begin, item.chunk_end, own, memory);
            kernels.finish(args, tile, own);
            return;
        }
        const int offset = item.chunk_begin - tile.chunk_begin;
        kernels.attention_chunks(args, tile, item.chunk_begin, item.chunk_end, state(item.first_state + offset),
                                 memory);
        if (chunks_left[item.first_state].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        const SoftmaxState total = state(item.first_state);
        for (int i = 1; i < tile.num_chunks(); ++i)
            kernels.merge(args, tile.num_rows(), total, state(item.first_state + i));
        kernels.finish(args, tile, total);
    }
};

int32_t attend(const KernelTable& kernels, const AttentionArgs& args, int num_threads, int32_t* error_detail) {
    const BatchCheck check = check_batch(args);
    if (check.error != BatchError::kNone) {
        error_detail[0] = check.seq;
        error_detail[1] = check.value;
        return static_cast<int32_t>(check.error);
    }
    const AttentionPlan plan = plan_attention(args, num_threads);
    thread_local Arena arena;
    const size_t state_floats = kernels.state_floats(args);
    void* states = plan.num_states > 0 ? arena.reserve(plan.num_states * state_floats * sizeof(float)) : nullptr;
    if (plan.num_states > 0 && states == nullptr) return kOutOfMemory;
    AttentionJob job{kernels,
                     args,
                     plan,
                     static_cast<float*>(states),
                     state_floats,
                     aligned64(kernels.scratch_bytes(args)),
                     std::make_unique<std::atomic<int>[]>(plan.num_states)};
    for (const AttentionItem& item : plan.items)
        if (item.first_state >= 0) job.chunks_left[item.first_state].store(plan.tiles[item.tile].num_chunks());
    run_parallel(
        static_cast<int>(plan.items.size()), plan.num_threads,
        [](void* context, int item) { static_cast<AttentionJob*>(context)->run(item); }, &job);
    return job.out_of_memory ? kOutOfMemory : kOk;
}

int32_t check_slots(const int64_t* slots, int num_tokens, int64_t num_slots, int32_t* error_detail) {
    for (int t = 0; t < num_tokens; ++t)
        if (slots[t] >= num_slots) {
            error_detail[0] = t;
            return kSlotOutOfRange;
        }
    return kOk;
}

// Splits [0, size) into one range of multiples of `grain` per item, about four per thread, and runs them.
template <class Function>
void run_ranges(int size, int grain, int num_threads, Function function) {
    const int grains = (size + grain - 1) / grain, items = num_threads > 1 ? std::min(grains, 4 * num_threads) : 1;
    struct Context {
        int size, grain, grains, items;
        Function* function;
    } context{size, grain, grains, items, &function};
    run_parallel(
        items, num_threads,
        [](void* p, int item) {
            const Context& c = *static_cast<Context*>(p);
            const int64_t begin = static_cast<int64_t>(c.grains) * item / c.items * c.grain;
            const int64_t end = static_cast<int64_t>(c.grains) * (item + 1) / c.items * c.grain;
            (*c.function)(static_cast<int>(begin), static_cast<int>(std::min<int64_t>(end, c.size)));
        },
        &context);
}

}  // namespace
}  // namespace afd

using namespace afd;

int32_t afd_abi_version() { return kAbiVersion; }

int32_t afd_isa_available(int32_t isa) {
#if defined(AFD_HAVE_X86)
    // GCC's and Clang's test includes the operating system's support (XGETBV).
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == kIsaAvx2) return avx2;
    if (isa == kIsaAvx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bf16");
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
    try {
        return attend(table_of(isa), args, num_threads, error_detail);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

int32_t afd_write_kv(int32_t isa, int32_t dtype, const void* k, const void* v, void* k_cache, void* v_cache,
                     const int64_t* slots, int64_t k_stride, int64_t v_stride, int32_t num_tokens, int32_t num_kv_heads,
                     int32_t head_dim, int32_t v_dim, int32_t num_blocks, int32_t block_size, int32_t* error_detail) {
    const int32_t status = check_slots(slots, num_tokens, static_cast<int64_t>(num_blocks) * block_size, error_detail);
    if (status != kOk) return status;
    table_of(isa).write_kv({k, v, k_cache, v_cache, slots, k_stride, v_stride, dtype, num_tokens, num_kv_heads,
                            head_dim, v_dim, block_size});
    return kOk;
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

int32_t afd_add_rms_norm(int32_t isa, int32_t dtype, int32_t partial_dtype, void* x, const void* const* partials,
                         int32_t num_partials, const float* weight, void* out, int32_t num_rows, int32_t width,
                         float eps) {
    NormArgs args{x, {}, weight, out, dtype, partial_dtype, num_partials, num_rows, width, eps};
    for (int i = 0; i < num_partials; ++i) args.partials[i] = partials[i];
    table_of(isa).add_rms_norm(args, 0, num_rows);
    return kOk;
}

int32_t afd_silu_mul(int32_t isa, int32_t dtype, const void* gate_up, void* out, int64_t in_stride, int64_t out_stride,
                     int32_t num_rows, int32_t width, float limit) {
    table_of(isa).silu_mul({gate_up, out, in_stride, out_stride, dtype, num_rows, width, limit}, 0, num_rows);
    return kOk;
}

int32_t afd_gemm_bf16(int32_t isa, int32_t num_threads, const void* x, const void* w, void* out, int32_t out_dtype,
                      int64_t x_stride, int64_t w_stride, int64_t out_stride, int32_t m, int32_t n, int32_t k) {
    const GemmArgs args{x, w, out, x_stride, w_stride, out_stride, out_dtype, m, n, k};
    const KernelTable& kernels = table_of(isa);
    constexpr int kRowGrain = 32;                   // rows of w: whole cache lines of every output
    constexpr int64_t kBytesPerThread = 256 << 10;  // less is read in the time it takes to wake a thread
    const int64_t busy = std::clamp<int64_t>(static_cast<int64_t>(n) * k * 2 / kBytesPerThread, 1, num_threads);
    run_ranges(n, kRowGrain, static_cast<int>(busy), [&](int begin, int end) { kernels.gemm(args, begin, end); });
    return kOk;
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

void afd_stop_workers() { stop_workers(); }

int32_t afd_num_workers() { return num_workers(); }
