// Drawing tokens from rows of logits by the rule of docs/sampling.md.
//
// All that decides is exact, or computed in a fixed order of IEEE operations without fused multiply-adds (these files are
// compiled so): a token depends neither on the instruction set nor on how the work is shared out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"

namespace afd {

constexpr int kGroup = 64;             // neighbouring tokens whose random numbers have a common smallest one
constexpr int kLanesOfGroup = 16;      // a group's numbers: 16 blocks of 4 words; word w of block b is token 16 w + b's
constexpr int32_t kOneMass = 1 << 28;  // of the largest logit

struct GroupRange {
    int32_t begin, end;
};

struct MassArgs {
    const float* x;        // [width]
    const float* highest;  // [groups], the largest of each group
    int32_t width;
    float largest, scale;  // weight = 2^((x - largest) * scale)
    int32_t least;         // lesser masses count as 0
    float low, high;       // elements in [low, high) are wanted
    int32_t* found;        // their places; room for all elements of the range
    const float* after;    // a row that will be read next, to be fetched meanwhile; null = none
};
struct MassSums {
    int64_t total, above;  // of all elements; of those that are at least `high`
    int32_t num_found;
};

// Functions without state, one table per instruction set; groups are numbered from that of x[0] on.
struct SampleTable {
    // The largest element of each group; true if there is a NaN.
    bool (*scan)(const float* x, int32_t width, GroupRange groups, float* highest);
    void (*weigh)(const float* x, int32_t count, float largest, float scale, float* weights);
    MassSums (*sum_masses)(const MassArgs&, GroupRange groups);
    // Philox4x32-10: words[w][i] of the block with counter (first[i], counter[0], counter[1], counter[2]).
    void (*random)(const uint32_t* first, const uint32_t* counter, uint64_t key, uint32_t (*words)[kLanesOfGroup]);
};

// kNoSuchToken where a row names a token that is not in the vocabulary; error_detail: the row and that token.
int32_t check_tokens(const AfdSampleRow* rows, int32_t num_rows, int32_t width, int32_t* error_detail);

// tokens [num_rows], logprobs [num_rows, 1 + num_top], top_ids [num_rows, num_top]. Throws std::bad_alloc.
void sample(const SampleTable& kernels, const float* logits, int64_t stride, int32_t width, const AfdSampleRow* rows,
            int32_t num_rows, const AfdSampled& out, int num_threads);

}  // namespace afd
