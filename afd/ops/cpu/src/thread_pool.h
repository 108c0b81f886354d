// Worker threads for the kernels of one process.
//
// The caller works too, so run(..., num_threads) wakes num_threads - 1 workers; one that comes when all items are taken is
// not waited for. They are started when first wanted, spin for kSpinNs between jobs (a layer's kernels follow one another
// closely), for kLongSpinNs where the last sleep was shorter than that (but only while nobody else wants their core), and
// then sleep. One job runs at a time: a second caller that finds the pool busy does its job alone, so nobody waits for a
// stranger's work.
#pragma once

#include <cstdint>

namespace afd {

constexpr int kMaxThreads = 64;
constexpr int64_t kHotSpinNs = 5'000;
constexpr int64_t kSpinNs = 50'000;
constexpr int64_t kLongSpinNs = 400'000;

// Calls body(context, item) for item in [0, num_items), each once, in any order, on up to num_threads threads, and
// returns when all are done. The body must not throw. If no thread can be started, the caller does all the work.
void run_parallel(int num_items, int num_threads, void (*body)(void* context, int item), void* context);

// Starts workers, so that up to num_threads threads can work on the next job; they run where the caller may run now.
void start_workers(int num_threads);

// Ends and joins the workers. A later job starts new ones.
void stop_workers();

int num_workers();

}  // namespace afd
