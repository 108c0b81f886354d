#include "run.h"

#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "attention_plan.h"

namespace afd {
namespace {

struct AttentionJob {
    const KernelTable& kernels;
    const AttentionArgs& args;
    const AttentionPlan& plan;
    float* states;
    size_t state_floats, scratch_bytes;
    std::unique_ptr<std::atomic<int>[]> chunks_left;  // per state index of a split tile's first chunk
    std::atomic<bool> out_of_memory{false};

    SoftmaxState state(int index) const { return kernels.state_at(args, states + index * state_floats); }

    // Threads take items in order, so this one will get about the plan.num_threads-th from here.
    TileRange next_of(int index) const {
        const size_t following = static_cast<size_t>(index) + plan.num_threads;
        if (following >= plan.items.size()) return {nullptr, 0, 0};
        const AttentionItem& item = plan.items[following];
        const AttentionTile& tile = plan.tiles[item.tile];
        return {&tile, std::max(tile.key_begin, item.chunk_begin * kChunkKeys),
                std::min(tile.key_end, item.chunk_end * kChunkKeys)};
    }

    void run(int index) {
        const AttentionItem& item = plan.items[index];
        const AttentionTile& tile = plan.tiles[item.tile];
        thread_local Arena arena;
        char* memory = static_cast<char*>(arena.reserve(scratch_bytes + state_floats * sizeof(float)));
        if (memory == nullptr) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        const TileRange next = next_of(index);
        if (item.first_state < 0) {
            const SoftmaxState own = kernels.state_at(args, reinterpret_cast<float*>(memory + scratch_bytes));
            kernels.attention_chunks(args, tile, item.chunk_begin, item.chunk_end, next, own, memory);
            kernels.finish(args, tile, own);
            return;
        }
        const int offset = item.chunk_begin - tile.chunk_begin;
        kernels.attention_chunks(args, tile, item.chunk_begin, item.chunk_end, next, state(item.first_state + offset),
                                 memory);
        if (chunks_left[item.first_state].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        const SoftmaxState total = state(item.first_state);
        for (int i = 1; i < tile.num_chunks(); ++i)
            kernels.merge(args, tile.num_rows(), total, state(item.first_state + i));
        kernels.finish(args, tile, total);
    }
};

}  // namespace

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

GemmInput::GemmInput(const KernelTable& kernels, const GemmArgs& args, int num_threads) : kernels_(kernels) {
    if (args.w.scales == nullptr || args.m == 0) return;
    thread_local Arena arena;
    const size_t bytes = kernels.rounded_bytes(args.m, args.k);
    rounded_ = arena.reserve(bytes);
    if (rounded_ == nullptr && bytes > 0) throw std::bad_alloc();
    constexpr int kRowsPerThread = 16;
    run_ranges(args.m, 1, std::clamp(args.m / kRowsPerThread, 1, num_threads),
               [&](int begin, int end) { kernels.round_rows(args, rounded_, begin, end); });
}

void GemmInput::multiply(const GemmArgs& args, int begin, int end) const {
    if (args.w.scales == nullptr)
        kernels_.gemm(args, begin, end);
    else
        kernels_.gemm_int8(args, rounded_, begin, end);
}

int gemm_threads(const GemmArgs& args, int num_threads) {
    constexpr int64_t kBytesPerThread = 256 << 10;  // less is read in the time it takes to wake a thread
    const int64_t bytes = static_cast<int64_t>(args.n) * args.k * (args.w.scales != nullptr ? 1 : 2);
    return static_cast<int>(std::clamp<int64_t>(bytes * (1 + args.m / 16) / kBytesPerThread, 1, num_threads));
}

namespace {

// Rows [begin, end) of a GEMM over bf16 weights.
GemmArgs rows_of(const GemmArgs& args, int begin, int end) {
    const int64_t element_bytes = args.mode == kToBfloat16 ? 2 : sizeof(float);
    GemmArgs part = args;
    part.x = static_cast<const char*>(args.x) + 2 * begin * args.x_stride;
    part.out = static_cast<char*>(args.out) + element_bytes * begin * args.out_stride;
    part.m = end - begin;
    return part;
}

}  // namespace

void run_gemm(const KernelTable& kernels, const GemmArgs& args, int num_threads) {
    if (args.m == 0) return;
    const int threads = gemm_threads(args, num_threads);
    const GemmInput input(kernels, args, threads);
    const bool int8 = args.w.scales != nullptr;
    // Panels that cannot be shared out evenly are shared by rows, where a second reading of theirs costs less than that.
    constexpr int kRowsPerThread = 16;
    const int panels = (args.n + kPanel - 1) / kPanel;
    const int uneven = int8 || args.m < kRowsPerThread * threads ? 0 : panels % threads;
    const int ranges = std::min(panels - uneven, 4 * threads);
    if (uneven == 0 || ranges < threads) {
        run_ranges(args.n, int8 ? kInt8Panel : kPanel, threads,
                   [&](int begin, int end) { input.multiply(args, begin, end); });
        return;
    }
    const auto column = [&](int panel) { return std::min(panel * kPanel, args.n); };
    run_items(ranges + uneven * threads, threads, [&](int item) {
        if (item < ranges) {
            const int64_t whole = panels - uneven;
            input.multiply(args, column(whole * item / ranges), column(whole * (item + 1) / ranges));
            return;
        }
        const int panel = panels - uneven + (item - ranges) / threads, part = (item - ranges) % threads;
        const GemmArgs rows = rows_of(args, args.m * part / threads, args.m * (part + 1) / threads);
        input.multiply(rows, column(panel), column(panel + 1));
    });
}

void run_gemm_row_max(const KernelTable& kernels, const GemmArgs& args, const RowMaxima& best, int64_t first,
                      int num_threads) {
    constexpr int kColumns = 256;  // multiplied before they are looked at: of 64 rows, they stay in the L2 cache
    constexpr int kItemsPerThread = 8;
    if (args.m == 0) return;
    const int threads = gemm_threads(args, num_threads);
    const GemmInput input(kernels, args, threads);
    const int64_t blocks = (args.n + kColumns - 1) / kColumns;
    const int items = threads > 1 ? static_cast<int>(std::min<int64_t>(blocks, kItemsPerThread * threads)) : 1;
    std::vector<float> largest(static_cast<size_t>(items) * args.m);
    std::vector<int64_t> idx(largest.size());
    std::atomic<bool> out_of_memory{false};
    run_items(items, threads, [&](int item) {
        thread_local Arena arena;
        float* const sums = static_cast<float*>(arena.reserve(sizeof(float) * kColumns * args.m));
        if (sums == nullptr) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        const RowMaxima found{&largest[static_cast<size_t>(item) * args.m], &idx[static_cast<size_t>(item) * args.m]};
        found.clear(args.m);
        for (int64_t block = blocks * item / items; block < blocks * (item + 1) / items; ++block) {
            const int begin = static_cast<int>(block) * kColumns, end = std::min(begin + kColumns, args.n);
            GemmArgs part = args;
            part.w = rows_from(args.w, begin, args.k);
            part.out = sums;
            part.out_stride = kColumns;
            part.mode = kToFloat32;
            part.n = end - begin;
            part.after = end < args.n ? rows_from(args.w, end, args.k).data : nullptr;
            input.multiply(part, 0, part.n);
            kernels.row_max({sums, found.largest, found.idx, kColumns, begin, args.m, part.n}, 0, args.m);
        }
    });
    if (out_of_memory) throw std::bad_alloc();
    for (int item = 0; item < items; ++item)
        for (int row = 0; row < args.m; ++row) {
            const size_t at = static_cast<size_t>(item) * args.m + row;
            const bool is_nan = largest[at] != largest[at], was_nan = best.largest[row] != best.largest[row];
            if (was_nan || !(is_nan || largest[at] > best.largest[row])) continue;
            best.largest[row] = largest[at];
            best.idx[row] = first + idx[at];
        }
}

AfdMatrix rows_from(const AfdMatrix& w, int row, int k) {
    const bool int8 = w.scales != nullptr;
    const int64_t row_bytes = int8 ? int8_depth(k) : 2 * static_cast<int64_t>(k);
    return {static_cast<const char*>(w.data) + row * row_bytes, int8 ? w.scales + row : nullptr};
}

int32_t check_slots(const int64_t* slots, int num_tokens, int64_t num_slots, int32_t* error_detail) {
    for (int t = 0; t < num_tokens; ++t)
        if (slots[t] >= num_slots) {
            error_detail[0] = t;
            return kSlotOutOfRange;
        }
    return kOk;
}

}  // namespace afd
