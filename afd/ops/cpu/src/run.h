// Running the kernels of one instruction set over a batch: working memory, work split, checks.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>

#include "kernels.h"
#include "thread_pool.h"

namespace afd {

enum Status : int32_t {
    kOk = 0,  // 1..4 are BatchError
    kSlotOutOfRange = 10,
    kNoSuchToken = 11,
    kOutOfMemory = 20,
};

const KernelTable& table_of(int32_t isa);  // which must be available

// No exception leaves a C function.
template <class Function>
int32_t guarded(Function function) {
    try {
        return function();
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

inline size_t aligned64(size_t bytes) { return (bytes + 63) / 64 * 64; }

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

// Paged attention of a batch; nothing is written unless it returns kOk. Throws std::bad_alloc.
int32_t attend(const KernelTable& kernels, const AttentionArgs& args, int num_threads, int32_t* error_detail);

int32_t check_slots(const int64_t* slots, int num_tokens, int64_t num_slots, int32_t* error_detail);

// Runs function(item) for each item of [0, num_items).
template <class Function>
void run_items(int num_items, int num_threads, Function function) {
    run_parallel(
        num_items, num_threads, [](void* f, int item) { (*static_cast<Function*>(f))(item); }, &function);
}

// Splits [0, size) into one range of multiples of `grain` per item, about four per thread, and runs them.
template <class Function>
void run_ranges(int size, int grain, int num_threads, Function function) {
    const int64_t grains = (size + grain - 1) / grain;
    const int items = num_threads > 1 ? static_cast<int>(std::min<int64_t>(grains, 4 * num_threads)) : 1;
    run_items(items, num_threads, [&](int item) {
        const int64_t begin = grains * item / items * grain, end = grains * (item + 1) / items * grain;
        function(static_cast<int>(begin), static_cast<int>(std::min<int64_t>(end, size)));
    });
}

// x of a GEMM as its weights' kernel takes it: int8 weights want it rounded, once for all columns. Throws std::bad_alloc.
// Good until the next one of this thread; any thread may multiply.
class GemmInput {
  public:
    GemmInput(const KernelTable& kernels, const GemmArgs& args, int num_threads);

    // Columns [begin, end) of `args`, whose x is the constructor's.
    void multiply(const GemmArgs& args, int begin, int end) const;

  private:
    const KernelTable& kernels_;
    void* rounded_ = nullptr;
};

// Of num_threads, how many a GEMM is worth.
int gemm_threads(const GemmArgs& args, int num_threads);

// The matrix without its first `row` rows, a multiple of kPanel.
AfdMatrix rows_from(const AfdMatrix& w, int row, int k);

// Throws std::bad_alloc as GemmInput does.
void run_gemm(const KernelTable& kernels, const GemmArgs& args, int num_threads);

// The first NaN or else the first largest element of each row: largest [m], idx [m].
struct RowMaxima {
    float* largest;
    int64_t* idx;

    // Before anything was found.
    void clear(int num_rows) const {
        std::fill_n(largest, num_rows, -std::numeric_limits<float>::infinity());
        std::fill_n(idx, num_rows, 0);
    }
};

// Joins the rows' maxima of what run_gemm would write, columns numbered from `first` on, into `best`, of columns before
// them; args.out and its stride are not used. Throws std::bad_alloc.
void run_gemm_row_max(const KernelTable& kernels, const GemmArgs& args, const RowMaxima& best, int64_t first,
                      int num_threads);

}  // namespace afd
