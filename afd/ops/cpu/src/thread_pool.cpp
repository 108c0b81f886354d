#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace afd {
namespace {

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Polls `done` for up to limit_ns: at first without a pause, after kHotSpinNs only while nobody else wants the core.
template <class Done>
bool poll(int64_t limit_ns, Done done) {
    const int64_t begun = now_ns();
    for (int64_t waited = 0; waited < limit_ns; waited = now_ns() - begun) {
        if (done()) return true;
        if (waited < kHotSpinNs)
            pause_cpu();
        else
            sched_yield();
    }
    return done();
}

constexpr int kCountBits = 8;
constexpr uint64_t kCountMask = 0x7f, kClosed = 0x80;
static_assert(kMaxThreads <= static_cast<int>(kCountMask));

class ThreadPool {
  public:
    ~ThreadPool() { stop(); }

    void run(int num_items, int num_threads, void (*body)(void*, int), void* context) {
        std::unique_lock<std::mutex> job(job_mutex_, std::try_to_lock);
        if (!job.owns_lock()) {
            for (int i = 0; i < num_items; ++i) body(context, i);
            return;
        }
        const int wanted = grow(std::min(std::min(num_threads, kMaxThreads), num_items) - 1);
        body_ = body;
        context_ = context;
        num_items_ = num_items;
        next_item_.store(0, std::memory_order_relaxed);
        finished_.store(0, std::memory_order_relaxed);
        generation_ += 1;
        joined_.store(generation_ << kCountBits, std::memory_order_release);
        {
            std::lock_guard<std::mutex> lock(wake_mutex_);
            // Generation and number of workers wanted in one word: a worker sees both or neither.
            ticket_.store(generation_ << kCountBits | static_cast<uint64_t>(wanted), std::memory_order_release);
        }
        if (sleeping_.load(std::memory_order_seq_cst) > 0) wake_.notify_all();
        work();
        wait_for_workers();
    }

    void stop() {
        std::lock_guard<std::mutex> job(job_mutex_);
        {
            std::lock_guard<std::mutex> lock(wake_mutex_);
            stopping_.store(true, std::memory_order_release);
        }
        wake_.notify_all();
        for (std::thread& t : workers_) t.join();
        workers_.clear();
        size_.store(0);
        stopping_.store(false, std::memory_order_release);
    }

    int size() const { return size_.load(); }

  private:
    // Starts workers until there are `wanted`; returns how many of them there are.
    int grow(int wanted) {
        while (static_cast<int>(workers_.size()) < wanted) {
            const int index = static_cast<int>(workers_.size());
            const uint64_t seen = ticket_.load(std::memory_order_relaxed);
            try {
                workers_.emplace_back([this, index, seen] { worker_main(index, seen); });
            } catch (const std::system_error&) {
                break;  // no thread to be had: fewer hands, same result
            }
            size_.store(static_cast<int>(workers_.size()));
        }
        return std::min(wanted, static_cast<int>(workers_.size()));
    }

    void work() {
        for (;;) {
            const int item = next_item_.fetch_add(1, std::memory_order_relaxed);
            if (item >= num_items_) return;
            body_(context_, item);
        }
    }

    // The caller has run out of items: nobody may join any more, and who did is at most one item behind. A worker that has
    // not woken up by now is not waited for.
    void wait_for_workers() {
        const int count = static_cast<int>(joined_.fetch_or(kClosed, std::memory_order_acq_rel) & kCountMask);
        const auto finished = [this, count] { return finished_.load(std::memory_order_seq_cst) == count; };
        if (poll(kLongSpinNs, finished)) return;
        std::unique_lock<std::mutex> lock(wake_mutex_);
        waiting_.store(true, std::memory_order_seq_cst);
        done_.wait(lock, finished);
        waiting_.store(false, std::memory_order_relaxed);
    }

    // False when the job of this ticket is over.
    bool join(uint64_t ticket) {
        uint64_t joined = joined_.load(std::memory_order_acquire);
        do {
            if (joined >> kCountBits != ticket >> kCountBits || (joined & kClosed) != 0) return false;
        } while (!joined_.compare_exchange_weak(joined, joined + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        return true;
    }

    void worker_main(int index, uint64_t seen) {
        while (wait_for_ticket(&seen)) {
            if (index >= static_cast<int>(seen & kCountMask) || !join(seen)) continue;
            work();
            finished_.fetch_add(1, std::memory_order_seq_cst);
            if (waiting_.load(std::memory_order_seq_cst)) {
                std::lock_guard<std::mutex> lock(wake_mutex_);
                done_.notify_one();
            }
        }
    }

    // False when the pool stops.
    bool wait_for_ticket(uint64_t* seen) {
        const auto news = [&] {
            return stopping_.load(std::memory_order_acquire) || ticket_.load(std::memory_order_acquire) != *seen;
        };
        const int64_t begun = now_ns();
        if (!poll(spin_ns_.load(std::memory_order_relaxed), news)) {
            std::unique_lock<std::mutex> lock(wake_mutex_);
            sleeping_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, news);
            sleeping_.fetch_sub(1, std::memory_order_seq_cst);
            // Waking up takes longer than the sleep saved, where jobs follow one another a little later than expected.
            const bool soon = now_ns() - begun < kLongSpinNs;
            spin_ns_.store(soon ? kLongSpinNs : kSpinNs, std::memory_order_relaxed);
        }
        *seen = ticket_.load(std::memory_order_acquire);
        return !stopping_.load(std::memory_order_acquire);
    }

    std::mutex job_mutex_, wake_mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<int> size_{0};
    std::atomic<bool> stopping_{false};
    std::atomic<int> sleeping_{0};
    std::atomic<int64_t> spin_ns_{kSpinNs};
    void (*body_)(void*, int) = nullptr;
    void* context_ = nullptr;
    int num_items_ = 0;
    uint64_t generation_ = 0;
    std::atomic<bool> waiting_{false};  // the caller sleeps until finished_ is what it should be
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> next_item_{0};
    alignas(64) std::atomic<uint64_t> joined_{0};  // generation, kClosed, number of workers that have joined
    alignas(64) std::atomic<int> finished_{0};     // of these
};

// One pool a process. After fork() the child has none of its threads: it gets a new pool, and the old one is leaked
// on purpose, since its mutexes may have been held.
std::unique_ptr<ThreadPool>& pool() {
    static std::unique_ptr<ThreadPool> instance = [] {
        pthread_atfork(nullptr, nullptr, [] {
            static_cast<void>(pool().release());
            pool() = std::make_unique<ThreadPool>();
        });
        return std::make_unique<ThreadPool>();
    }();
    return instance;
}

}  // namespace

void run_parallel(int num_items, int num_threads, void (*body)(void*, int), void* context) {
    if (num_threads <= 1 || num_items <= 1) {
        for (int i = 0; i < num_items; ++i) body(context, i);
        return;
    }
    pool()->run(num_items, num_threads, body, context);
}

void start_workers(int num_threads) { run_parallel(num_threads, num_threads, [](void*, int) {}, nullptr); }

void stop_workers() { pool()->stop(); }

int num_workers() { return pool()->size(); }

}  // namespace afd
