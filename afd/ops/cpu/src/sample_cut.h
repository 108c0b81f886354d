// Which tokens top_k and top_p leave: of a row in falling order (of equal logits the lower id comes first) those down to
// a last one.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "sample.h"
#include "run.h"

namespace afd {

// A row of (adjusted) logits whose largest is finite, and what was found out about it.
struct LogitRow {
    const SampleTable& kernels;
    const float* x;
    int32_t width;
    const float* highest;  // of each group
    float largest;
    const float* after;  // the row that will probably be read next; null = none
    int32_t num_groups() const { return (width + kGroup - 1) / kGroup; }
};

// The last token that is kept, in falling order; by default all are.
struct Cut {
    float x = -std::numeric_limits<float>::infinity();
    int32_t id = std::numeric_limits<int32_t>::max();
    bool keeps(float value, int32_t at) const { return value > x || (value == x && at <= id); }
};

// Room for a list: keeps what it has, as filling it anew takes time.
template <class T>
class Room {
  public:
    T* of(size_t count) {
        if (items_.size() < count) items_.resize(count);
        return items_.data();
    }

  private:
    std::vector<T> items_;
};

// A token and its mass.
struct Entry {
    uint32_t key;  // in the order of the logits
    int32_t id, mass;
};

// A thread's lists.
struct CutScratch {
    std::vector<int32_t> ids;
    Room<int32_t> found;
    Room<uint16_t> bins;
    Room<float> values, weights;
    Room<Entry> entries;
};

// The weight of a logit, in units of 1 / kOneMass.
inline int32_t mass_of(float weight) {
    return static_cast<int32_t>(__builtin_lrintf(weight * static_cast<float>(kOneMass)));
}

// scratch.ids become those of the `count` first tokens in falling order, or of more.
void find_first(const LogitRow& row, int32_t count, CutScratch& scratch);

// top_k 0 and top_p 1 keep all. Masses below `least` do not count for top_p.
Cut find_cut(const LogitRow& row, float scale, int32_t top_k, double top_p, int32_t least, CutScratch& scratch,
             int num_threads);

// Sums over a whole row, on up to num_threads threads; args.found has room for num_groups * kGroup places.
MassSums sum_masses(const SampleTable& kernels, const MassArgs& args, int num_threads);

// The largest element of each group, by up to num_threads threads; true if there is a NaN.
bool scan(const SampleTable& kernels, const float* x, int32_t width, float* highest, int num_threads);

}  // namespace afd
