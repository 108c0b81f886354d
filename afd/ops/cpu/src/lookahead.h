// Prefetching spread over the work on what is already there.
#pragma once

#include "simd.h"

namespace AFD_ISA {

// A stretch of memory that will be read soon.
struct Run {
    const char* begin;
    int64_t bytes;
};

// Brings runs into the cache while something else is worked on, a few lines at each step of its inner loops: a core
// keeps only some dozens of lines in flight, and stalls on a burst.
class Lookahead {
  public:
    AFD_INLINE Lookahead() = default;

    // `runs` must outlive this. All lines will have been asked for after num_steps (> 0) steps.
    Lookahead(const Run* runs, int num_runs, int64_t num_steps) : run_(runs), runs_end_(runs + num_runs) {
        int64_t lines = 0;
        for (int i = 0; i < num_runs; ++i) lines += (runs[i].bytes + 63) / 64;
        rate_ = static_cast<int>((lines + num_steps - 1) / num_steps);
        at_ = run_->begin;
        end_ = at_ + run_->bytes;
    }

    AFD_INLINE void step() {
        for (int i = 0; i < rate_; ++i) {
            prefetch(at_);
            at_ += 64;
            if (at_ >= end_) next_run();
        }
    }

  private:
    AFD_INLINE void next_run() {
        if (++run_ == runs_end_) {
            rate_ = 0;
            return;
        }
        at_ = run_->begin;
        end_ = at_ + run_->bytes;
    }

    const char *at_ = nullptr, *end_ = nullptr;
    const Run *run_ = nullptr, *runs_end_ = nullptr;
    int rate_ = 0;
};

}  // namespace AFD_ISA
